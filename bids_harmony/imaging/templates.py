"""Templates that need no download: nilearn's ICBM 2009a, and what TEMPLATEFLOW_HOME holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np

from bids_harmony.config import DEFAULT_TEMPLATE
from bids_harmony.errors import MissingInputError, UsageError

_BUNDLED = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class OutputSpace:
    """One output space.

    Attributes
    ----------
    name
        ``native`` or a template.
    resolution
        Voxel size in mm; None: native, or the template's own.
    """

    name: str
    resolution: float | None = None

    @property
    def res(self) -> str:
        """Label of the ``res-`` entity, empty when none was asked for."""
        return f"{self.resolution:g}".replace(".", "p") if self.resolution else ""


def parse_space(text: str) -> OutputSpace:
    """Read ``native`` or ``TEMPLATE[:res-N]``.

    Raises
    ------
    UsageError
        If the text is neither.
    """
    name, *modifiers = text.split(":")
    if name == "native" and not modifiers:
        return OutputSpace("native")
    resolution = None
    for modifier in modifiers:
        key, _, value = modifier.partition("-")
        if key != "res" or not value.isdigit() or not 1 <= int(value) <= 8:
            raise UsageError(f"--output-spaces {text}: only :res-N with N mm from 1 to 8 is known")
        resolution = float(value)
    if not name.isalnum() or name == "native":
        raise UsageError(f"--output-spaces {text}: write native or TEMPLATE[:res-N]")
    return OutputSpace(name, resolution)


def find_template(name: str) -> Path:
    """T1w image of a template, skull-stripped or not, 1 mm.

    Raises
    ------
    UsageError
        If the template is not bundled and TEMPLATEFLOW_HOME does not hold it.
    MissingInputError
        If nilearn no longer ships the bundled one.
    """
    if name == DEFAULT_TEMPLATE:
        spec = find_spec("nilearn")
        root = Path(spec.origin).parent if spec and spec.origin else Path()
        if not (root / _BUNDLED).is_file():
            raise MissingInputError(f"nilearn's template {_BUNDLED} is missing; reinstall nilearn")
        return root / _BUNDLED
    home = os.environ.get("TEMPLATEFLOW_HOME")
    path = Path(home or "") / f"tpl-{name}" / f"tpl-{name}_res-01_T1w.nii.gz"
    if home and path.is_file() and path.stat().st_size > 0:
        return path
    raise UsageError(
        f"template {name} is not here: {DEFAULT_TEMPLATE} is bundled; for others set "
        f"TEMPLATEFLOW_HOME to a folder with tpl-{name}/tpl-{name}_res-01_T1w.nii.gz "
        f"(python -c \"from templateflow.api import get; get('{name}')\" fetches it)"
    )


def template_image(name: str, resolution: float | None = None) -> Any:
    """Brain of a template, float32, values 0..1, zero outside the brain, at an isotropic size.

    Parameters
    ----------
    resolution
        Voxel size in mm; None: the template's own.
    """
    path = find_template(name)
    img: Any = nb.loadsave.load(path)
    data = np.asanyarray(img.dataobj, dtype=np.float32)
    mask_file = path.with_name(path.name.replace("_T1w", "_desc-brain_mask"))
    if name != DEFAULT_TEMPLATE and not mask_file.is_file():
        raise UsageError(f"{path} needs its brain mask beside it: {mask_file.name}")
    if mask_file.is_file():
        mask: Any = nb.loadsave.load(mask_file)
        data = np.where(np.asanyarray(mask.dataobj) > 0, data, 0)
    out = nb.nifti1.Nifti1Image(data / data.max(), img.affine)
    if resolution and not np.allclose(nb.affines.voxel_sizes(img.affine), resolution):
        out = _resized(out, resolution)
    return out


def _resized(img: Any, resolution: float) -> Any:
    """Average to another voxel size; the grid keeps the corner of its first voxel."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    zooms = nb.affines.voxel_sizes(img.affine)
    step = resolution / zooms
    shape = tuple(int(np.ceil(n / s)) for n, s in zip(img.shape, step, strict=True))
    smooth = gaussian_filter(img.get_fdata(dtype=np.float32), np.maximum(step - 1, 0) / 2.355)
    grid = np.meshgrid(
        *(np.arange(n) * s + (s - 1) / 2 for n, s in zip(shape, step, strict=True)), indexing="ij"
    )
    affine = img.affine @ np.diag([*step, 1.0])
    affine[:3, 3] = (img.affine @ [*((step - 1) / 2), 1.0])[:3]
    data = map_coordinates(smooth, grid, order=1, mode="nearest").astype(np.float32)
    return nb.nifti1.Nifti1Image(data, affine)
