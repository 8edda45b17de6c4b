"""The grammar of BIDS file names, from the schema that pybids builds on (bidsschematools)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

IMAGE_EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Grammar:
    """What a raw anatomical image may be called.

    Attributes
    ----------
    patterns
        Pattern of the label for each short key that a T1w, T2w or FLAIR may have.
    order
        Short keys in the order in which BIDS wants them.
    long_names
        Short key for each long name, e.g. ``acquisition`` -> ``acq``.
    """

    patterns: dict[str, re.Pattern[str]]
    order: tuple[str, ...]
    long_names: dict[str, str]


@dataclass(frozen=True)
class ParsedName:
    """Parts of a file name ``key-value_..._suffix.extension``."""

    entities: dict[str, str]
    suffix: str
    extension: str


@lru_cache(maxsize=1)
def grammar() -> Grammar:
    """Names that the BIDS schema allows for raw anatomical images (read once, 0.1 s)."""
    from bidsschematools.schema import load_schema

    schema = load_schema()
    entities = schema.objects.entities
    allowed = schema.rules.files.raw.anat.nonparametric.entities
    formats = schema.objects.formats
    patterns = {
        entities[name].name: re.compile(formats[entities[name].format].pattern) for name in allowed
    }
    return Grammar(
        patterns=patterns,
        order=tuple(entities[name].name for name in schema.rules.entities),
        long_names={name: entities[name].name for name in entities},
    )


def split_name(name: str) -> ParsedName | None:
    """Split a file name; None when it has not the form ``key-value_..._suffix.extension``."""
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    entities: dict[str, str] = {}
    for pair in pairs:
        key, dash, value = pair.partition("-")
        if not (key and dash and value) or key in entities:
            return None
        entities[key] = value
    if "-" in suffix or not suffix or not dot:
        return None
    return ParsedName(entities, suffix, dot + extension)


def name_fault(parsed: ParsedName, subject: str, session: str | None) -> str | None:
    """Say why a file name cannot be that of a raw scan in this folder; None when it can."""
    rules = grammar().patterns
    for key, value in parsed.entities.items():
        if key not in rules:
            return f"'{key}-' is not an entity of a raw anatomical scan; rename it (acq- is free)"
        if not rules[key].fullmatch(value):
            return f"'{key}-{value}' is not a BIDS label; rename the file"
    if parsed.entities.get("sub") != subject or parsed.entities.get("ses") != session:
        where = f"sub-{subject}" + (f"/ses-{session}" if session else "")
        return f"the name does not agree with its folder {where}; rename or move the file"
    return None
