"""Files and folders that options name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bids_harmony.errors import MissingInputError, UsageError


def derivative_folders(entries: Sequence[str]) -> dict[str, Path]:
    """``[name=]path`` -> {name: path}.

    Raises
    ------
    UsageError
        If a name comes twice.
    MissingInputError
        If a folder does not exist.
    """
    folders: dict[str, Path] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        path = Path(text).absolute()
        name = name or path.name
        if name in folders:
            raise UsageError(f"--derivatives: two folders are called {name!r}; write NAME=DIR")
        if not path.is_dir():
            raise MissingInputError(f"--derivatives {path} does not exist; is it mounted?")
        folders[name] = path
    return folders


def read_filters(path: Path | None) -> Mapping[str, Mapping[str, Any]] | None:
    """Content of a ``--bids-filter-file``.

    Raises
    ------
    UsageError
        If it is no JSON object of objects.
    """
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--bids-filter-file {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UsageError(f"--bids-filter-file {path}: an object of objects is needed")
    return content
