"""The BIDS filter file and label lists, as the command line gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bids_harmony.bids.entities import ParsedName, grammar
from bids_harmony.bids.scan import MODALITIES
from bids_harmony.errors import MissingInputError, UsageError

Filters = Mapping[str, Mapping[str, Any]]

# Queries in filter files written for other BIDS Apps: they concern no scan of ours.
_FOREIGN = {"bold", "sbref", "fmap", "dwi", "asl", "m0scan", "pet", "roi", "cifti", "meg", "eeg"}
_OTHER_KEYS = {"suffix", "extension", "datatype"}


def read_filter_file(path: Path) -> dict[str, dict[str, Any]]:
    """Read a ``--bids-filter-file``.

    Raises
    ------
    MissingInputError
        If it does not exist.
    UsageError
        If it is not JSON or not an object of objects.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MissingInputError(f"cannot read the filter file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the filter file {path} is not valid JSON: {error}") from error
    check_filters(content, source=str(path))
    return dict(content)


def check_filters(filters: Any, *, source: str = "the BIDS filter") -> None:
    """Refuse what would otherwise be ignored silently.

    Raises
    ------
    UsageError
        Naming the query or the entity that is not known.
    """
    if not isinstance(filters, Mapping) or not all(
        isinstance(f, Mapping) for f in filters.values()
    ):
        raise UsageError(f'{source} must look like {{"T1w": {{"acquisition": "mprage"}}}}')
    known = {name.lower() for name in MODALITIES} | _FOREIGN
    for query, wanted in filters.items():
        if query.lower() not in known:
            raise UsageError(f"{source}: unknown query '{query}'; use {', '.join(MODALITIES)}")
        for entity in wanted:
            _short_key(entity, source)


def passes(parsed: ParsedName, filters: Filters | None) -> bool:
    """Whether a scan is left by the filter of its modality.

    ``null`` means that the entity must be absent, ``"*"`` that it must be present; numbers match
    whatever their zero padding (``1`` matches ``run-01``).
    """
    for query, wanted in (filters or {}).items():
        if query.lower() != parsed.suffix.lower():
            continue
        for entity, value in wanted.items():
            if not _matches(_value(parsed, _short_key(entity, "the BIDS filter")), value):
                return False
    return True


def read_labels(values: Sequence[str] | None, entity: str) -> list[str] | None:
    """Labels without their ``sub-`` or ``ses-``, in the order given, each once; None stays None.

    A value that is an existing text file stands for the labels in it, one per line.

    Raises
    ------
    UsageError
        If nothing is left, or a value is not a label.
    """
    if values is None:
        return None
    labels: list[str] = []
    for value in values:
        labels += _labels_of(str(value))
    labels = [label.strip().removeprefix(f"{entity}-") for label in labels]
    labels = list(dict.fromkeys(label for label in labels if label))
    if not labels:
        raise UsageError(f"no {entity}- label in '{' '.join(map(str, values))}'")
    for label in labels:
        if not label.replace("+", "").isalnum():
            raise UsageError(f"'{label}' is neither a {entity}- label nor a text file of labels")
    return labels


def _labels_of(value: str) -> list[str]:
    # A label has no dot and no slash, so a file in the working folder never hides a label.
    if not {".", "/"} & set(value):
        return [value]
    path = Path(value)
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise MissingInputError(f"cannot read the labels in {value}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{value} is not a text file with one label per line") from error


def _short_key(entity: str, source: str) -> str:
    rules = grammar()
    if entity in _OTHER_KEYS or entity in rules.order:
        return entity
    if entity in rules.long_names:
        return rules.long_names[entity]
    raise UsageError(f"{source}: unknown entity '{entity}'; e.g. acquisition, run, session")


def _value(parsed: ParsedName, key: str) -> str | None:
    if key == "suffix":
        return parsed.suffix
    if key == "extension":
        return parsed.extension
    if key == "datatype":
        return "anat"
    return parsed.entities.get(key)


def _matches(actual: str | None, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_matches(actual, one) for one in wanted)
    if wanted is None:
        return actual is None
    if wanted == "*":
        return actual is not None
    if actual is None:
        return False
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return actual.isdigit() and int(actual) == wanted
    text = str(wanted)
    if actual.startswith("."):
        return actual.lstrip(".") == text.lstrip(".")
    return actual == text or actual == text.split("-", 1)[-1]
