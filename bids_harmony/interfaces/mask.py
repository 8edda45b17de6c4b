"""The brain mask: the best that the user gives, else what the scan itself tells, else our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.imaging.mask import (
    STRIPPED_ML,
    background_value,
    looks_skull_stripped,
    mask_from_stripped,
)
from bids_harmony.interfaces.ants import BrainMask
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    isdefined,
    traits,
)
from bids_harmony.interfaces.files import load, load_given_mask, load_mask, store

_SMALL_ML, _LARGE_ML = 300.0, 2500.0


class _SelectInput(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="conformed scan")
    name = traits.Str("scan", usedefault=True, desc="for messages")
    modality = traits.Str("T1w", usedefault=True)
    mode = traits.Enum("auto", "skip", "force", usedefault=True, desc="--skull-strip")
    given_file = File(desc="precomputed mask, on any grid in the scan's world space")
    given_source = traits.Str("", usedefault=True, desc="where that mask comes from")
    given_warnings = traits.List(traits.Str, desc="what was said when it was looked for or made")
    given_doubts = traits.List(traits.Str, desc="what an earlier run doubted about its mask")
    num_threads = traits.Int(1, usedefault=True)
    random_seed = traits.Int(0, usedefault=True)


class _SelectOutput(TimedOutputSpec):
    out_file = File(desc="brain mask on the scan's grid, uint8")
    source = traits.Str(desc="which mask this is")
    stripped = traits.Bool(desc="the scan is skull-stripped")
    warnings = traits.List(traits.Str)
    doubts = traits.List(traits.Str, desc="those of the warnings that belong to the mask itself")


class SelectBrainMask(TimedInterface):
    """Precomputed mask, else nonzero part of a stripped scan, else our own brain extraction."""

    input_spec = _SelectInput
    output_spec = _SelectOutput

    def _run(self, cwd: Path) -> None:
        data, affine = load(self.inputs.in_file)
        stripped = self._is_stripped(data, affine)
        doubts: list[str] = list(self._given("given_doubts") or [])
        if isdefined(self.inputs.given_file):
            mask = load_given_mask(self.inputs.given_file, data.shape, affine, "brain mask")
            source = self.inputs.given_source
        elif stripped:
            mask = mask_from_stripped(data)
            source = "nonzero part of the skull-stripped scan"
        else:
            mask, doubts = self._own_mask(cwd)
            source = "own brain extraction (registration to the head template)"
        self._check(mask, affine)
        self._results["out_file"] = store(mask.astype(np.uint8), affine, cwd / "mask.nii")
        self._results["source"] = source
        self._results["stripped"] = bool(stripped)
        self._results["doubts"] = doubts
        self._results["warnings"] = [*(self._given("given_warnings") or []), *doubts]

    def _is_stripped(self, data: Any, affine: Any) -> bool:
        mode = self.inputs.mode
        if mode == "skip" and not (data == 0).mean() > 0.2:
            raise ScanError(
                f"{self.inputs.name}: --skull-strip skip, but the scan has no zero background; "
                "use --skull-strip auto"
            )
        if mode != "auto":
            return bool(mode == "skip")
        inside = np.count_nonzero(data != background_value(data))
        small = inside * abs(np.linalg.det(affine[:3, :3])) / 1000 < STRIPPED_ML[0]
        # Less than a brain cannot be a head: its voxel size is wrong, as the volume check tells.
        return bool(looks_skull_stripped(data, None if small else affine))

    def _own_mask(self, cwd: Path) -> tuple[Any, list[str]]:
        node = BrainMask(
            in_file=self.inputs.in_file,
            modality=self.inputs.modality,
            num_threads=self.inputs.num_threads,
            random_seed=self.inputs.random_seed,
        )
        done = node.run(cwd=str(cwd)).outputs
        return load_mask(done.out_file), list(done.warnings or [])

    def _check(self, mask: Any, affine: Any) -> None:
        volume = float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
        if volume == 0:
            raise ScanError(
                f"{self.inputs.name}: the brain mask is empty; give one with --derivatives"
            )
        if not _SMALL_ML < volume < _LARGE_ML:
            raise ScanError(
                f"{self.inputs.name}: the brain mask holds {volume:.0f} ml, which is no brain; "
                "check the scan's voxel size and field of view, or give a mask with --derivatives"
            )
