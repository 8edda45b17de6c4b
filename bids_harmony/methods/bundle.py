"""Model bundles: a fitted method as a folder that holds data only, nothing executable.

``model.json`` (what and from where), ``weights.safetensors`` (the arrays), ``README.md`` (card),
and what else the training left to look at: tables and pictures, which nothing reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from bids_harmony._version import __version__
from bids_harmony.errors import HarmonyError, MissingInputError, UsageError
from bids_harmony.imaging.scale import IntensityScale
from bids_harmony.methods.base import Contract, Method
from bids_harmony.methods.folder import write_folder
from bids_harmony.methods.registry import available, load

SCHEMA_VERSION = 1
MODEL, WEIGHTS, README = "model.json", "weights.safetensors", "README.md"
PICTURES = (".png", ".svg")
SAFE_SUFFIXES = (*PICTURES, ".csv", ".json", ".tsv", ".txt")
_KEYS = ("schema_version", "method", "version", "contract", "params", "arrays", "weights", "meta")


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle as read from disk.

    Attributes
    ----------
    method
        The fitted method.
    meta
        What `save_bundle` was told: training sites, subjects, seed, held-out scores, licence,
        ``output_scale``.
    hash
        SHA-256 over ``model.json`` and ``weights.safetensors``, 64 hexadecimal digits.
    version
        Version of bids_harmony that wrote the bundle.
    """

    method: Method
    meta: Mapping[str, Any]
    hash: str
    version: str

    @property
    def output_scale(self) -> dict[str, IntensityScale]:
        """Per modality the reference domain's intensity scale; empty when meta has none."""
        return _output_scale(self.meta)


def save_bundle(
    folder: Path,
    method: Method,
    *,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a bundle; equal input gives equal bytes.

    Parameters
    ----------
    folder
        Bundle to write; its parent is made. An existing bundle there is replaced as a whole.
    method
        Fitted method.
    meta
        JSON-serialisable facts. Known keys: ``name``, ``reference_site``, ``training_sites``,
        ``training_subjects``, ``training_scans``, ``seed``, ``scores``, ``licence`` and
        ``output_scale`` (``{modality: IntensityScale.to_dict()}``).
    files
        Further files by name, such as training curves: plain names, suffixes `SAFE_SUFFIXES`.

    Returns
    -------
    folder
        As given.

    Raises
    ------
    OutputError
        If the folder exists and is not a bundle, or cannot be written.
    UsageError
        If `meta` or the method's params are not finite JSON, or a further file has a name that
        is not safe.
    """
    more = {name: _checked_file(name, content) for name, content in (files or {}).items()}
    arrays = {key: np.ascontiguousarray(value) for key, value in method.arrays().items()}
    weights = pack_arrays(arrays)
    content = {
        "schema_version": SCHEMA_VERSION,
        "method": method.name,
        "version": __version__,
        "contract": asdict(method.contract),
        "params": method.params(),
        "arrays": {key: _form(value) for key, value in sorted(arrays.items())},
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
        "meta": dict(meta),
    }
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}: the bundle's description is not JSON: {error}") from error
    _output_scale(meta)
    card = _model_card(method.name, method.contract, meta, sorted(more))
    whole = {**more, MODEL: text.encode(), WEIGHTS: weights, README: card.encode()}
    write_folder(folder, whole, what="model bundle", is_ours=is_bundle)
    return folder


def _checked_file(name: str, content: bytes) -> bytes:
    """Content of a further file, once its name is known to be safe."""
    reserved = {known.lower() for known in (MODEL, WEIGHTS, README)}
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[a-z]+)", name)
    if not plain or plain[1] not in SAFE_SUFFIXES or name.lower() in reserved:
        raise UsageError(
            f"{name!r} cannot be a file of a model bundle: letters, digits, _ and -, then one of "
            + ", ".join(SAFE_SUFFIXES)
        )
    if not isinstance(content, bytes):
        raise UsageError(
            f"{name}: a file of a model bundle is bytes, not {type(content).__name__}"
        )
    return content


def load_bundle(folder: Path) -> LoadedBundle:
    """Read a bundle and rebuild its method.

    Raises
    ------
    MissingInputError
        If the folder or one of its files does not exist.
    UsageError
        If the bundle is damaged, of another schema, of an unknown method, or inconsistent.
    """
    text, weights = _read(folder / MODEL), _read(folder / WEIGHTS)
    content = _parse(folder / MODEL, text)
    if hashlib.sha256(weights).hexdigest() != content["weights"].get("sha256"):
        raise UsageError(
            f"{folder / WEIGHTS}: damaged (its checksum is not the one in {MODEL}); "
            "copy the bundle again"
        )
    try:
        arrays = parse_arrays(weights)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error
    if {key: _form(value) for key, value in arrays.items()} != content["arrays"]:
        raise UsageError(f"{folder}: {WEIGHTS} and {MODEL} name other arrays; retrain the model")
    method = _rebuild(folder, content, arrays)
    digest = hashlib.sha256(text + weights).hexdigest()
    return LoadedBundle(method, content["meta"], digest, str(content["version"]))


def bundle_method(folder: Path) -> str:
    """Name of the method of a bundle, without loading it.

    Raises
    ------
    MissingInputError, UsageError
        As `load_bundle`.
    """
    return str(_parse(folder / MODEL, _read(folder / MODEL))["method"])


def bundle_hash(folder: Path) -> str:
    """The bundle's checksum, as in `LoadedBundle`, without loading its method.

    Raises
    ------
    MissingInputError
        If the folder or one of its files does not exist.
    """
    return hashlib.sha256(_read(folder / MODEL) + _read(folder / WEIGHTS)).hexdigest()


def bundle_meta(folder: Path) -> dict[str, Any]:
    """What `save_bundle` was told of a bundle, without loading its method.

    Raises
    ------
    MissingInputError, UsageError
        As `load_bundle`.
    """
    return dict(_parse(folder / MODEL, _read(folder / MODEL))["meta"])


def is_bundle(folder: Path) -> bool:
    """Whether the folder looks like a bundle (has both data files)."""
    return (folder / MODEL).is_file() and (folder / WEIGHTS).is_file()


def _output_scale(meta: Mapping[str, Any]) -> dict[str, IntensityScale]:
    scales = meta.get("output_scale", {})
    if not isinstance(scales, Mapping):
        raise UsageError(f"output_scale must give a scale per modality, not {scales!r}")
    return {key: IntensityScale.from_dict(value) for key, value in scales.items()}


def _form(array: NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read; a model is a folder with {MODEL} and {WEIGHTS}"
        ) from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """Content of ``model.json`` after checks of schema and keys."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error}); copy the bundle again") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: bundle schema {found!r}, this version of bids_harmony reads "
            f"{SCHEMA_VERSION}; retrain the model or use the version that wrote it"
        )
    lacking = [key for key in _KEYS if key not in content]
    wrong = [
        key
        for key in ("contract", "params", "arrays", "weights", "meta")
        if not isinstance(content.get(key), dict)
    ]
    if lacking or wrong:
        raise UsageError(f"{path}: {', '.join(lacking or wrong)} missing or broken; retrain")
    return content


def _rebuild(folder: Path, content: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Method:
    name = content["method"]
    if name not in available():
        raise UsageError(
            f"{folder / MODEL}: made by the method {name!r}, which is not installed "
            f"(installed: {', '.join(available())})"
        )
    kind = load(name)
    try:
        method = kind.from_state(arrays, content["params"])
        contract = asdict(method.contract)
    except (HarmonyError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{folder}: the arrays do not fit the method {name!r} ({error}); retrain the model"
        ) from error
    # a field that came after the bundle was written had its default
    stored = {**asdict(Contract(())), **content["contract"]}
    if json.loads(json.dumps(contract)) != json.loads(json.dumps(stored)):
        raise UsageError(
            f"{folder / MODEL}: its contract is not the one of the method {name!r} in this "
            f"version; retrain the model or use bids_harmony {content['version']}"
        )
    return method


def _model_card(
    method: str, contract: Contract, meta: Mapping[str, Any], files: Sequence[str]
) -> str:
    """Text of the bundle's README.md."""
    card = available().get(method)
    title = meta.get("name", method)
    lines = [
        f"# {title}",
        "",
        f"Harmonization model for bids_harmony {__version__}, method `{method}`"
        + (f" ({card.title}). {card.summary}" if card else "."),
        "",
        f"- Modalities: {', '.join(contract.modalities)}",
        f"- Grid: {contract.grid}"
        + (f" at {contract.resolution:g} mm" if contract.resolution else ""),
        f"- Intensity scale: {contract.scale}",
    ]
    lines += [
        f"- {key.replace('_', ' ').capitalize()}: {_plain(meta[key])}"
        for key in sorted(meta.keys() - {"name", "output_scale", "reference_quantiles"})
    ]
    lines += [
        f"- {modality} output units: {scale.low:g} to {scale.high:g}"
        for modality, scale in sorted(_output_scale(meta).items())
    ]
    if files:
        lines += ["", "## Training", "", *map(_link, files)]
    if card:
        lines += ["", "## Citation", "", card.citation + (f" doi:{card.doi}" if card.doi else "")]
    lines += ["", "The model was not made for diagnosis.", ""]
    return "\n".join(lines)


def _link(name: str) -> str:
    """Picture, or link to a table, as Markdown."""
    return f"![{name}]({name})\n" if name.endswith(PICTURES) else f"[{name}]({name})\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_plain(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
