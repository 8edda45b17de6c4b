"""What a method learned from a site that training has not seen, as a folder beside its model.

``adaptation.json`` (what, from which scans) and ``weights.safetensors`` (the arrays).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from bids_harmony.errors import HarmonyError, MissingInputError, UsageError
from bids_harmony.methods.base import Adaptation
from bids_harmony.methods.folder import write_folder

SCHEMA_VERSION = 1
ADAPTATION, WEIGHTS = "adaptation.json", "weights.safetensors"
_KEYS = ("schema_version", "details", "facts", "weights")


@dataclass(frozen=True)
class StoredAdaptation:
    """An adaptation as read from disk.

    Attributes
    ----------
    adaptation
        Arrays and details, for `NeuralMethod.adapted`.
    facts
        What `save_adaptation` was told: site, modality, scans, settings, model.
    hash
        SHA-256 over both files, 64 hexadecimal digits.
    """

    adaptation: Adaptation
    facts: Mapping[str, Any]
    hash: str


def save_adaptation(folder: Path, adaptation: Adaptation, *, facts: Mapping[str, Any]) -> Path:
    """Write an adaptation, whole or not at all; equal input gives equal bytes.

    Parameters
    ----------
    folder
        Folder to write; an existing adaptation there is replaced.
    adaptation
        What the method learned.
    facts
        JSON-serialisable: from which site, modality, scans and settings, for which model.

    Raises
    ------
    OutputError
        If the folder exists and is not an adaptation, or cannot be written.
    HarmonyError
        If details or facts are not finite JSON, or an array is not finite.
    """
    arrays = {key: np.ascontiguousarray(value) for key, value in adaptation.arrays.items()}
    wrong = [k for k, v in arrays.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
    if wrong:
        raise HarmonyError(f"{folder}: {', '.join(wrong)} of the adaptation is not finite")
    weights = pack_arrays(arrays)
    content = {
        "schema_version": SCHEMA_VERSION,
        "details": dict(adaptation.details),
        "facts": dict(facts),
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise HarmonyError(f"{folder}: the adaptation's details are not JSON: {error}") from error
    files = {ADAPTATION: text.encode(), WEIGHTS: weights}
    write_folder(folder, files, what="stored adaptation", is_ours=_holds_nothing_else)
    return folder


def load_adaptation(folder: Path) -> StoredAdaptation:
    """Read an adaptation.

    Raises
    ------
    MissingInputError
        If the folder or one of its files does not exist.
    UsageError
        If it is damaged or of another schema.
    """
    text, weights = _read(folder / ADAPTATION), _read(folder / WEIGHTS)
    broken = UsageError(f"{folder}: the stored adaptation is damaged; remove the folder")
    try:
        content = json.loads(text)
        arrays = parse_arrays(weights)
    except (SafetensorError, ValueError) as error:
        raise broken from error
    if not isinstance(content, dict) or any(key not in content for key in _KEYS):
        raise broken
    if content["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{folder}: adaptation schema {content['schema_version']!r}, this version of "
            f"bids_harmony reads {SCHEMA_VERSION}; remove the folder"
        )
    if content["weights"] != hashlib.sha256(weights).hexdigest():
        raise broken
    digest = hashlib.sha256(text + weights).hexdigest()
    return StoredAdaptation(Adaptation(arrays, content["details"]), content["facts"], digest)


def _holds_nothing_else(folder: Path) -> bool:
    """Whether a folder holds files of an adaptation only, whole or damaged."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= {ADAPTATION, WEIGHTS}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from error
