"""Names of derivatives, as BIDS Derivatives and the NiPreps write them."""

from __future__ import annotations

import re
from pathlib import Path

from bids_harmony.bids.scan import Scan

# Order of entities in the BIDS schema (rules.entities); from/to/mode are not in BIDS and stand
# where NiPreps puts them.
ENTITY_ORDER = (
    "sub", "tpl", "ses", "cohort", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce", "trc",
    "stain", "rec", "dir", "run", "mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi",
    "space", "split", "recording", "chunk", "from", "to", "mode", "atlas", "seg", "scale", "res",
    "den", "label", "desc",
)  # fmt: skip

_LABEL = re.compile(r"[a-zA-Z0-9+]+")


def check_label(entity: str, value: str) -> str:
    """Return `value` when it is a BIDS label (letters, digits and ``+``).

    Raises
    ------
    ValueError
        If it is not.
    """
    if not _LABEL.fullmatch(value):
        raise ValueError(f"{entity}-{value}: a BIDS label has only letters, digits and +")
    return value


def derivative_path(
    out_dir: Path,
    scan: Scan,
    *,
    space: str | None = None,
    res: str | None = None,
    desc: str | None = None,
    label: str | None = None,
    suffix: str | None = None,
    extension: str = ".nii.gz",
    from_: str | None = None,
    to: str | None = None,
    folder: str | None = None,
) -> Path:
    """Path of a derivative of `scan`; all entities of the scan are kept.

    A derivative with another suffix than the scan (``mask``, ``biasfield``) would have the same
    name for the T1w and the T2w of one session; for T2w and FLAIR the modality is therefore
    appended to `desc`: ``desc-brainT2w_mask`` beside ``desc-brain_mask``, which stays the T1w's as
    in fMRIPrep.

    Parameters
    ----------
    out_dir
        Root of the derivative data set.
    space, res, desc, label
        Labels of letters, digits and ``+``; None leaves the entity out.
    suffix
        Default: the scan's own (BIDS: unchanged suffix = preprocessed).
    extension
        With the dot.
    from_, to
        Both for a transform: ``from-T1w_to-MNI152NLin2009aSym_mode-image_xfm.txt``; `suffix` is
        then ``xfm``.
    folder
        Below `out_dir`; default: that of the scan (``sub-01/ses-1/anat``). ``figures`` stands for
        ``sub-01/figures``.

    Raises
    ------
    ValueError
        If a label is not a BIDS label, if only one of `from_` and `to` is given, or if an image
        would get the name of a raw scan.
    """
    if (from_ is None) != (to is None):
        raise ValueError("a transform needs both from_ and to")
    suffix = suffix or ("xfm" if from_ else scan.suffix)
    if suffix != scan.suffix and from_ is None and scan.suffix != "T1w":
        desc = f"{desc or ''}{scan.suffix}"
    new = {"space": space, "res": res, "desc": desc, "label": label, "from": from_, "to": to}
    added = {k: check_label(k, v) for k, v in new.items() if v is not None}
    if from_ is not None:
        added["mode"] = "image"
    if suffix == scan.suffix and not {"space", "desc"} & added.keys():
        raise ValueError(
            f"{scan.stem}: a derivative needs space- or desc-, or it looks like raw data"
        )
    entities = {**scan.entities, **added}
    pairs = sorted(entities.items(), key=lambda item: _position(item[0]))
    name = "_".join([*(f"{k}-{v}" for k, v in pairs), suffix]) + extension
    where = f"sub-{scan.subject}/figures" if folder == "figures" else (folder or scan.folder)
    return out_dir / where / name


def fragment_path(out_dir: Path, scan: Scan, desc: str) -> Path:
    """Where a scan's section of the report is kept."""
    return derivative_path(out_dir, scan, desc=desc, folder="figures", extension=".html")


def _position(entity: str) -> int:
    return ENTITY_ORDER.index(entity) if entity in ENTITY_ORDER else len(ENTITY_ORDER)


def sidecar_path(path: Path) -> Path:
    """Path of the JSON file beside an image, e.g. ``x.nii.gz`` -> ``x.json``."""
    return path.with_name(strip_extension(path.name) + ".json")


def strip_extension(name: str) -> str:
    """File name up to its first dot (BIDS labels have none)."""
    return name.split(".", 1)[0]
