"""Which model bundle a run uses, and why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from bids_harmony.bids.scan import MODALITIES
from bids_harmony.config import DEFAULT_ADAPT, DEFAULT_METHOD, DEFAULT_TEMPLATE
from bids_harmony.errors import MissingInputError, UsageError
from bids_harmony.methods.base import NATIVE_GRID, NeuralMethod
from bids_harmony.methods.bundle import bundle_meta, bundle_method, is_bundle, load_bundle
from bids_harmony.methods.registry import available
from bids_harmony.resources import pick_device
from bids_harmony.workflows.settings import Target

_SHIPPED = Path(__file__).parent.parent / "data" / "models"


def bundle_name(method: str, reference: str) -> str:
    """Default name of the bundle of a method fitted on a site or scan.

    A label that is not plain text gets a checksum, so that no two references share a name.
    """
    words = reference_words(reference)
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", words)
    digest = hashlib.sha256(words.encode()).hexdigest()[:6]
    return f"{method}-{label}" if label == words else f"{method}-{label}-{digest}"


def reference_words(reference: str) -> str:
    """The reference as bundles name it: the site's label, or the file name of a scan."""
    return Path(reference).name.split(".")[0] if Path(reference).is_file() else reference


def theta_of(reference: str) -> dict[str, tuple[float, ...]]:
    """Numbers by modality, of a reference such as ``T1w=0.3,-1.2/T2w=0.1,0.4``.

    Empty for any other reference.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    part = rf"(?:{'|'.join(MODALITIES)})={number}(?:,{number})*"
    if not re.fullmatch(rf"{part}(?:/{part})*", reference):
        return {}
    pairs = (words.split("=") for words in reference.split("/"))
    return {modality: tuple(map(float, numbers.split(","))) for modality, numbers in pairs}


def named_bundle(out_dir: Path, *, method: str | None, model: str) -> Path:
    """Folder of the model that was named.

    Raises
    ------
    MissingInputError
        If it does not exist.
    UsageError
        If it holds another method.
    """
    folder = _named(model, out_dir)
    held = bundle_method(folder)
    if method not in (None, held):
        raise UsageError(f"--method {method}, but the bundle {folder} holds {held}")
    return folder


def networks_for(
    out_dir: Path, *, method: str | None, model: str | None, reference: str
) -> Path | None:
    """Bundle whose networks serve for a reference, for methods that harmonize by example.

    Returns
    -------
    folder
        The model that was named; else the bundle trained for this reference; else the only
        trained one. None if there is none yet, or the method does not harmonize by example.

    Raises
    ------
    MissingInputError
        If the model that was named does not exist.
    UsageError
        If the model that was named has a reference of its own, or several bundles would do.
    """
    if model is not None:
        folder = named_bundle(out_dir, method=method, model=model)
        held = bundle_method(folder)
        if held not in available() or not available()[held].by_example:
            raise UsageError("--model has a reference of its own; give --model or --reference")
        return folder
    if not available()[method or DEFAULT_METHOD].by_example:
        return None
    folders = [f for f in _bundles(out_dir / "models") if bundle_method(f) == method]
    trained = [f for f in folders if "networks" not in bundle_meta(f)]
    named = [f for f in trained if f.name == bundle_name(str(method), reference)]
    if len(named or trained) > 1:
        names = ", ".join(f.name for f in trained)
        raise UsageError(
            f"{out_dir / 'models'} holds several trained bundles of {method} ({names}); choose "
            "one with --model"
        )
    return next(iter(named or trained), None)


def choose_bundle(
    out_dir: Path, *, method: str | None, model: str | None, reference: str | None
) -> tuple[Path, str]:
    """Folder of the bundle to use and the reason in words.

    Order: ``--model``; the bundle fitted for ``--reference``; the only bundle (of the method)
    below ``out_dir/models``; the one that ships with the package.

    Raises
    ------
    MissingInputError
        If the model that was named does not exist, or the reference was never fitted.
    UsageError
        If several bundles would do.
    """
    trained = _bundles(out_dir / "models")
    if model is not None:
        return _named(model, out_dir), "asked for with --model"
    if reference is not None:
        folder = out_dir / "models" / bundle_name(method or DEFAULT_METHOD, reference)
        if not is_bundle(folder):
            raise MissingInputError(f"{folder} does not exist; fit it with the train level first")
        made_for = load_bundle(folder).meta.get("reference")
        if made_for != reference_words(reference):
            raise UsageError(
                f"{folder} was fitted on {made_for}, not on {reference}; remove it or "
                "train with another --name"
            )
        return folder, f"fitted on {Path(reference).name} as --reference asks"
    if method is not None:
        trained = [f for f in trained if bundle_method(f) == method]
    if len(trained) == 1:
        return trained[0], "the only bundle of OUT_DIR/models" + (f" for {method}" * bool(method))
    if len(trained) > 1:
        names = ", ".join(f.name for f in trained)
        raise UsageError(
            f"{out_dir / 'models'} holds several bundles ({names}); choose one with "
            "--model or --reference"
        )
    name = f"{method or DEFAULT_METHOD}-default"
    if not is_bundle(_SHIPPED / name):
        raise UsageError(
            f"no model for {method or DEFAULT_METHOD} ships with the package; fit one with the "
            "train level, or give --reference SITE"
        )
    return _SHIPPED / name, "shipped default; nothing else was chosen or trained"


def _named(model: str, out_dir: Path) -> Path:
    places = [Path(model).absolute(), out_dir / "models" / model, _SHIPPED / model]
    for folder in places:
        if is_bundle(folder):
            return folder
    looked = ", ".join(str(p) for p in places[:2])
    shipped = ", ".join(f.name for f in _bundles(_SHIPPED))
    raise MissingInputError(f"--model {model}: no bundle in {looked}; the package ships {shipped}")


def _bundles(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and is_bundle(f))


def load_target(
    folder: Path, why: str, *, method: str | None, device: str, adapt: str | None = None
) -> Target:
    """Read a bundle as a `Target`.

    Parameters
    ----------
    adapt
        ``site``, ``scan``, ``none``, or None for the default; no matter to methods that do not
        adapt.

    Raises
    ------
    UsageError
        If the bundle holds another method than the one asked for, or lacks the output scale.
    """
    bundle = load_bundle(folder)
    name = bundle.method.name
    if method is not None and method != name:
        raise UsageError(f"--method {method}, but the bundle {folder} holds {name}")
    card = available()[name]
    contract = bundle.method.contract
    missing = [m for m in contract.modalities if m not in bundle.output_scale]
    if missing:
        raise UsageError(
            f"{folder}: the bundle has no output_scale for {', '.join(missing)}; train it again"
        )
    return Target(
        method=name,
        title=card.title,
        citations=(card.citation,),
        bundle=folder,
        name=folder.name,
        hash=bundle.hash,
        why=why,
        reference=str(bundle.meta.get("common") or bundle.meta.get("reference", folder.name)),
        contract=contract,
        output_scale={k: v.to_dict() for k, v in bundle.output_scale.items()},
        reference_quantiles=dict(bundle.meta.get("reference_quantiles", {})),
        device=pick_device(device, card.devices)[0],
        memory_gb=card.memory_gb if card.kind == "neural" else 0.0,
        training_sites=tuple(bundle.meta.get("training_sites", ())),
        adapt=(adapt or DEFAULT_ADAPT) if card.adapts else "",
        segments=isinstance(bundle.method, NeuralMethod) and bundle.method.segments,
    )


def template_of(spaces: Sequence[str], grid: str) -> str:
    """The one template that scans are registered to.

    Raises
    ------
    UsageError
        If output spaces and the model's grid name several.
    """
    names = {s for s in spaces if s != "native"} | ({grid} - {NATIVE_GRID})
    if len(names) > 1:
        raise UsageError(
            f"one template per run, but {', '.join(sorted(names))} are needed (output spaces and "
            "the model's grid); run once per template with its own --desc"
        )
    return names.pop() if names else DEFAULT_TEMPLATE
