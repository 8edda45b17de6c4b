"""Rigid registration of the scans of a session to each other: one head in several contrasts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation

from bids_harmony.errors import ScanError
from bids_harmony.interfaces.ants import AntsSpec, ants_session, given_mask
from bids_harmony.interfaces.ants_functions import (
    RAS_TO_LPS,
    REGISTRATION_SPACING,
    START_SPACING,
    Array,
    coarse,
    coarse_to_fine,
    inverted,
    load,
    to_ants,
    write_affine,
)
from bids_harmony.interfaces.base import File, TimedInterface, TimedOutputSpec, traits

#: How far around the brain mask the head counts, mm: its edge says where the brain is.
MARGIN = 6.0
#: Below this Dice coefficient the brain masks of two scans of one head are not believed.
MASKS_AGREE = 0.85


def register_scans(
    ants: Any,
    fixed: tuple[Array, Array],
    moving: tuple[Array, Array],
    fixed_mask: Array,
    folder: Path,
    *,
    fine: bool = True,
) -> str:
    """Rigid transform of one scan of a head to another at 2 mm (Mattes mutual information).

    The metric sees the fixed scan's brain and `MARGIN` around it, and the whole of the moving
    scan, whose own mask may be wrong or end elsewhere.

    Parameters
    ----------
    fixed, moving
        Data (X, Y, Z), finite, and RAS affine.
    fixed_mask
        Brain mask of the fixed scan.
    folder
        For the files that ANTs writes.
    fine
        Go on from 4 mm to 2 mm.

    Returns
    -------
    Path of a transform that, in ``apply_transforms(fixed, moving)``, carries the moving scan.
    """
    weight = coarse(fixed_mask.astype(np.float32), fixed[1], REGISTRATION_SPACING)
    regions = _around(*coarse(*weight, START_SPACING)), _around(*weight)
    return coarse_to_fine(ants, fixed, moving, "Rigid", folder, regions, fine=fine)


def _around(weight: Array, affine: Array) -> Array:
    """Where a coarse mask is above a tenth, widened by `MARGIN`."""
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    reach = np.ceil(MARGIN / zooms).astype(int)
    axes = np.ogrid[tuple(slice(-r, r + 1) for r in reach)]
    distance = sum((axis * zoom) ** 2 for axis, zoom in zip(axes, zooms, strict=True))
    return binary_dilation(weight > 0.1, structure=distance <= MARGIN**2)


def read_affine(ants: Any, path: str | Path) -> Array:
    """RAS point map (fixed -> moving) of a linear ITK transform, shape (4, 4)."""
    transform = ants.read_transform(str(path))
    far = 100.0
    start = np.array(transform.apply_to_point((0.0, 0.0, 0.0)))
    ends = [np.array(transform.apply_to_point(tuple(far * np.eye(3)[k]))) for k in range(3)]
    lps = np.eye(4)
    lps[:3, :3] = np.stack([(end - start) / far for end in ends], axis=1)
    lps[:3, 3] = start
    return RAS_TO_LPS @ lps @ RAS_TO_LPS


def mask_overlap(
    ants: Any,
    fixed_mask: tuple[Array, Array],
    moving_mask: tuple[Array, Array],
    transform: str,
    folder: Path,
) -> float:
    """Dice coefficient of two brain masks within the moving scan's field of view.

    Parameters
    ----------
    fixed_mask, moving_mask
        Data (X, Y, Z) and RAS affine.
    transform
        Of `register_scans`.
    folder
        For temporary files.

    Returns
    -------
    Between 0 and 1.
    """
    moving = coarse(moving_mask[0].astype(np.float32), moving_mask[1], REGISTRATION_SPACING)
    fixed = coarse(fixed_mask[0].astype(np.float32), fixed_mask[1], REGISTRATION_SPACING)
    carried = ants.apply_transforms(
        to_ants(ants, *moving),
        to_ants(ants, *fixed),
        inverted(ants, [transform], [True], folder),
        whichtoinvert=[False],
    ).numpy()
    one, two = carried > 0.5, moving[0] > 0.5
    return float(2 * (one & two).sum() / max(1, one.sum() + two.sum()))


class _CoRegisterInput(AntsSpec):
    moving = File(exists=True, mandatory=True, desc="scan, bias-corrected")
    moving_mask = File(exists=True, mandatory=True, desc="its brain mask, on its grid")
    fixed = File(exists=True, mandatory=True, desc="another scan of the session, bias-corrected")
    fixed_mask = File(exists=True, mandatory=True, desc="its brain mask, on its grid")
    fixed_transform = File(
        exists=True, mandatory=True, desc="linear transform of the fixed scan to the template"
    )
    fixed_name = traits.Str(mandatory=True, desc="for messages")
    sloppy = traits.Bool(False, usedefault=True, desc="stop at 4 mm; for tests")


class _CoRegisterOutput(TimedOutputSpec):
    out_transform = File(exists=True, desc="ITK text transform from-scan_to-template")
    warnings = traits.List(traits.Str, desc="why the scans may not lie on each other")


class CoRegister(TimedInterface):
    """Register a scan rigidly to another of its session, and go its way to the template."""

    input_spec = _CoRegisterInput
    output_spec = _CoRegisterOutput

    def _run(self, cwd: Path) -> None:
        values = self.inputs
        moving, fixed = load(values.moving), load(values.fixed)
        moving_mask = given_mask(values.moving_mask, *moving)
        fixed_mask = given_mask(values.fixed_mask, *fixed)
        assert moving_mask is not None  # both are mandatory
        assert fixed_mask is not None
        out = cwd / "from-scan_to-template_rigid.txt"
        with (
            tempfile.TemporaryDirectory(dir=cwd) as scratch,
            ants_session(values.num_threads, values.random_seed, scratch) as ants,
        ):
            folder = Path(scratch)
            found = register_scans(ants, fixed, moving, fixed_mask, folder, fine=not values.sloppy)
            masks = (fixed_mask, fixed[1]), (moving_mask, moving[1])
            overlap = mask_overlap(ants, *masks, found, folder)
            joined = read_affine(ants, found) @ read_affine(ants, values.fixed_transform)
            if not np.isfinite(joined).all():
                raise ScanError(f"{values.moving}: could not be registered to {values.fixed_name}")
            write_affine(ants, joined, out)
        self._results["out_transform"] = str(out)
        self._results["warnings"] = _doubts(overlap, values.fixed_name)


def _doubts(overlap: float, name: str) -> list[str]:
    if overlap >= MASKS_AGREE:
        return []
    return [
        f"registered to {name}, but their brain masks overlap by {overlap:.2f} (Dice) only; look "
        "at the masks and registrations of both"
    ]
