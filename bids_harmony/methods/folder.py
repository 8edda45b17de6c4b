"""Write a folder of several files whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from bids_harmony.errors import OutputError


def write_folder(
    folder: Path, files: Mapping[str, bytes], *, what: str, is_ours: Callable[[Path], bool]
) -> None:
    """Put all files in place at once; an existing folder is moved aside first, then removed.

    Parameters
    ----------
    folder
        Folder to write; its parent is made.
    files
        Content by plain file name.
    what
        What the folder is, for messages.
    is_ours
        Whether an existing folder that is not empty may be replaced.

    Raises
    ------
    OutputError
        If something else is there, or the folder cannot be written.
    """
    foreign = not folder.is_dir() or any(folder.iterdir())
    if folder.exists() and not is_ours(folder) and foreign:
        raise OutputError(f"{folder}: exists and is not a {what}; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
            if folder.exists():
                folder.replace(old)
            try:
                new.replace(folder)
            except OSError:
                if old.exists():
                    old.replace(folder)
                raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the {what} ({error})") from error
