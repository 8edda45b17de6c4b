"""ANTs through antspyx behind Nipype: bias field, registration, resampling, brain mask.

Registration is bit-identical from run to run with a seed and one thread, and only then.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import InputMultiObject
from nipype.utils.filemanip import fname_presuffix

from bids_harmony.errors import ScanError
from bids_harmony.imaging.mask import coarse_affine
from bids_harmony.interfaces.ants_functions import (
    N4_SPACING,
    Array,
    divide_by_bias,
    fit_bias,
    inverted,
    load,
    load_mask,
    register_rigid,
    save,
    to_ants,
    voxel_factors,
)
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    isdefined,
    traits,
)
from bids_harmony.interfaces.brain_mask import brain_mask

INTERPOLATIONS = ("linear", "nearestNeighbor", "lanczosWindowedSinc", "bSpline")


@contextmanager
def ants_session(num_threads: int, random_seed: int, folder: str | Path) -> Iterator[Any]:
    """Import antspyx with its threads, seed and temporary folder set.

    Parameters
    ----------
    num_threads
        ITK threads. ITK reads this once per process, so the first session of a process decides.
    random_seed
        Seed of the metric's sampling, any whole number.
    folder
        Where every temporary file goes.
    """
    names = {
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(num_threads),
        "OMP_NUM_THREADS": str(num_threads),
        "ANTS_RANDOM_SEED": str(random_seed % (2**31 - 2) + 1),
        "TMPDIR": str(folder),
    }
    before = {name: os.environ.get(name) for name in names}
    tempdir = tempfile.tempdir
    os.environ.update(names)
    tempfile.tempdir = str(folder)
    try:
        import ants

        yield ants
    finally:
        tempfile.tempdir = tempdir
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def given_mask(path: Any, data: Array, affine: Array) -> Array | None:
    """Read an optional mask input."""
    return load_mask(path, data, affine) if isdefined(path) else None


class AntsSpec(BaseInterfaceInputSpec):
    num_threads = traits.Int(1, usedefault=True, desc="ITK threads")
    random_seed = traits.Int(0, usedefault=True, desc="seed of the metric's sampling")


class _N4InputSpec(AntsSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan, finite, non-negative")
    mask_file = File(exists=True, desc="brain mask on the scan's grid")
    given_file = File(exists=True, desc="the field that an earlier run fitted to this scan")


class _N4OutputSpec(TimedOutputSpec):
    out_file = File(exists=True, desc="scan divided by the bias field, on the scan's grid")
    bias_file = File(exists=True, desc="bias field on a coarse grid, mean 1 in the mask")


class N4BiasField(TimedInterface):
    """Divide a scan by its N4 bias field, fitted on a coarse grid or by an earlier run."""

    input_spec = _N4InputSpec
    output_spec = _N4OutputSpec

    def _run(self, cwd: Path) -> None:
        source, folder = self.inputs.in_file, cwd
        data, affine = load(source)
        if data.min() < 0:
            raise ScanError(f"{source}: holds negative intensities; conform it first")
        grid = coarse_affine(affine, voxel_factors(affine, N4_SPACING))
        if isdefined(self.inputs.given_file):
            field = self._earlier(data.shape, affine)
        else:
            mask = given_mask(self.inputs.mask_file, data, affine)
            with ants_session(self.inputs.num_threads, self.inputs.random_seed, folder) as ants:
                field = fit_bias(ants, data, affine, mask)
        out = fname_presuffix(source, suffix="_n4", newpath=folder)
        bias = fname_presuffix(source, suffix="_bias", newpath=folder)
        self._results["bias_file"] = save(field, grid, bias)
        self._results["out_file"] = save(divide_by_bias(data, affine, field), affine, out)

    def _earlier(self, shape: tuple[int, ...], affine: Array) -> Array:
        """The given field, checked: on the scan's coarse grid, positive and finite."""
        path = self.inputs.given_file
        field: Array = load(path)[0]
        factors = voxel_factors(affine, N4_SPACING)
        wanted = tuple(-(-n // k) for n, k in zip(shape, factors, strict=True))
        if field.shape != wanted or not np.isfinite(field).all() or field.min() <= 0:
            raise ScanError(f"{path}: not a bias field of this scan; delete it and run again")
        return field


class _RigidInputSpec(AntsSpec):
    moving = File(exists=True, mandatory=True, desc="scan, bias-corrected")
    moving_mask = File(exists=True, desc="brain mask on the scan's grid")
    fixed = File(exists=True, mandatory=True, desc="template, skull-stripped when a mask is given")
    transform_type = traits.Enum("Rigid", "Affine", usedefault=True)
    sloppy = traits.Bool(False, usedefault=True, desc="stop at 4 mm; for tests")


class _RigidOutputSpec(TimedOutputSpec):
    out_transform = File(exists=True, desc="ITK text transform from-scan_to-template")


class RigidRegistration(TimedInterface):
    """Register a scan to a template at 2 mm with 6 (or 12) degrees of freedom."""

    input_spec = _RigidInputSpec
    output_spec = _RigidOutputSpec

    def _run(self, cwd: Path) -> None:
        folder = cwd
        moving = load(self.inputs.moving)
        mask = given_mask(self.inputs.moving_mask, *moving)
        fixed = load(self.inputs.fixed)
        out = folder / f"from-scan_to-template_{self.inputs.transform_type.lower()}.txt"
        with (
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            ants_session(self.inputs.num_threads, self.inputs.random_seed, scratch) as ants,
        ):
            kind = self.inputs.transform_type
            found = register_rigid(
                ants, fixed, moving, kind, Path(scratch), mask, fine=not self.inputs.sloppy
            )
            ants.write_transform(found, str(out))
        self._results["out_transform"] = str(out)


class _ApplyInputSpec(AntsSpec):
    in_file = File(exists=True, mandatory=True, desc="image to resample")
    reference_file = File(exists=True, mandatory=True, desc="image whose grid is wanted")
    transforms = InputMultiObject(
        File(exists=True), mandatory=True, desc="transforms; the last is applied first"
    )
    invert = traits.List(traits.Bool, desc="per transform: use its inverse; default none")
    interpolation = traits.Enum(*INTERPOLATIONS, usedefault=True)
    default_value = traits.Float(0.0, usedefault=True, desc="value outside the field of view")


class _ApplyOutputSpec(TimedOutputSpec):
    out_file = File(exists=True, desc="resampled image, float32, on the reference's grid")


class ApplyTransform(TimedInterface):
    """Resample an image onto the grid of another through ITK transforms."""

    input_spec = _ApplyInputSpec
    output_spec = _ApplyOutputSpec

    def _run(self, cwd: Path) -> None:
        values = self.inputs
        data, affine = load(values.in_file)
        shape_data, grid = load(values.reference_file)
        invert = values.invert if isdefined(values.invert) else [False] * len(values.transforms)
        if len(invert) != len(values.transforms):
            raise ValueError("give one invert flag per transform")
        out = fname_presuffix(values.in_file, suffix="_resampled", newpath=cwd)
        with (
            tempfile.TemporaryDirectory(dir=cwd) as scratch,
            ants_session(values.num_threads, values.random_seed, scratch) as ants,
        ):
            moved = ants.apply_transforms(
                to_ants(ants, shape_data, grid),
                to_ants(ants, data, affine),
                inverted(ants, values.transforms, invert, Path(scratch)),
                interpolator=values.interpolation,
                whichtoinvert=[False] * len(invert),
                defaultvalue=values.default_value,
            ).numpy()
        self._results["out_file"] = save(moved, grid, out)


class _BrainMaskInputSpec(AntsSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed whole head")
    modality = traits.Enum("T1w", "T2w", "FLAIR", usedefault=True)


class _BrainMaskOutputSpec(TimedOutputSpec):
    out_file = File(exists=True, desc="brain mask, uint8, on the scan's grid")
    confidence = traits.Range(0.0, 1.0, desc="1: nothing suspicious; less: see the warnings")
    warnings = traits.List(traits.Str, desc="why the mask may be wrong")


class BrainMask(TimedInterface):
    """Mask the brain of a whole head."""

    input_spec = _BrainMaskInputSpec
    output_spec = _BrainMaskOutputSpec

    def _run(self, cwd: Path) -> None:
        data, affine = load(self.inputs.in_file)
        with (
            tempfile.TemporaryDirectory(dir=cwd) as scratch,
            ants_session(self.inputs.num_threads, self.inputs.random_seed, scratch) as ants,
        ):
            mask, warnings = brain_mask(ants, data, affine, Path(scratch), self.inputs.modality)
        out = fname_presuffix(self.inputs.in_file, suffix="_mask", newpath=cwd)
        self._results["out_file"] = save(mask, affine, out)
        self._results["warnings"] = warnings
        self._results["confidence"] = 0.5 if warnings else 1.0
