"""Interfaces around the pure array work of `imaging`."""

from __future__ import annotations

from pathlib import Path

import nibabel as nb
import numpy as np

from bids_harmony.imaging.change import (
    apply_change,
    blur_to,
    brain_curve,
    distributed_change,
    extend_change,
)
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.scale import IntensityScale, fit_scale
from bids_harmony.imaging.tone import ToneCurve, carried, fit_tone
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask, sha256, store

_EXTEND_VOXELS = 4.0
_LEVELS = 1001


class _ConformInput(BaseInterfaceInputSpec):
    in_file = File(mandatory=True, desc="raw scan")


class _ConformOutput(TimedOutputSpec):
    out_file = File(desc="finite, 3-D, non-negative float32 scan on the raw grid")
    notes = traits.List(traits.Str, desc="what was mended, for report and sidecar")
    checksum = traits.Str(desc="sha256 of the raw file")


class Conform(TimedInterface):
    """Read a raw scan and make it safe to work with."""

    input_spec = _ConformInput
    output_spec = _ConformOutput

    def _run(self, cwd: Path) -> None:
        done = conform(Path(self.inputs.in_file))
        self._results["out_file"] = store(done.data, done.affine, cwd / "conformed.nii")
        self._results["notes"] = list(done.notes)
        self._results["checksum"] = sha256(self.inputs.in_file)


class _ScaleInput(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="bias-corrected scan")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the same grid")
    kind = traits.Enum("robust", "minmax", usedefault=True, desc="how the range is found")
    name = traits.Str("scan", usedefault=True, desc="for messages")


class _ScaleOutput(TimedOutputSpec):
    out_file = File(desc="scan on the common scale, not clipped")
    scale = traits.Dict(desc="parameters that invert the scale")


class ScaleIntensity(TimedInterface):
    """Bring a scan to the common intensity scale; the parameters invert it exactly."""

    input_spec = _ScaleInput
    output_spec = _ScaleOutput

    def _run(self, cwd: Path) -> None:
        data, affine = load(self.inputs.in_file)
        scale = fit_scale(
            data, load_mask(self.inputs.mask_file), self.inputs.kind, name=self.inputs.name
        )
        self._results["out_file"] = store(scale.apply(data), affine, cwd / "scaled.nii")
        self._results["scale"] = scale.to_dict()


class _ChangeInput(BaseInterfaceInputSpec):
    before_file = File(exists=True, mandatory=True, desc="scaled scan on the model's grid")
    after_file = File(exists=True, mandatory=True, desc="harmonized scan on the model's grid")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the model's grid")
    resampled = traits.Bool(mandatory=True, desc="the change will be interpolated to another grid")
    keep_distribution = traits.Bool(False, usedefault=True, desc="of the brain's intensities")


class _ChangeOutput(TimedOutputSpec):
    out_file = File(desc="change, less the tone curve if there is one, continued outside the mask")
    tone = traits.Dict(desc="tone curve; empty when the change is not interpolated")
    distribution = traits.List(traits.Float, desc="quantiles to keep; empty when none are")
    spacing = traits.Float(desc="voxel size of the model's grid in mm")


class Change(TimedInterface):
    """What the method changed, in a form that interpolation keeps.

    It is continued past the brain's edge; what depends on intensity alone has the anatomy's edges
    in it and goes as a curve.
    """

    input_spec = _ChangeInput
    output_spec = _ChangeOutput

    def _run(self, cwd: Path) -> None:
        before, affine = load(self.inputs.before_file)
        after, _ = load(self.inputs.after_file)
        mask = load_mask(self.inputs.mask_file)
        rest, tone = after - before, {}
        quantiles: list[float] = []
        if self.inputs.resampled:
            curve = fit_tone(before, after, mask)
            rest, tone = after - curve(before), curve.to_dict()
            if self.inputs.keep_distribution:
                quantiles = np.quantile(after[mask], np.linspace(0, 1, _LEVELS)).tolist()
        change = extend_change(rest, mask, _EXTEND_VOXELS)
        self._results["out_file"] = store(change, affine, cwd / "change.nii")
        self._results["tone"] = tone
        self._results["distribution"] = quantiles
        self._results["spacing"] = float(nb.affines.voxel_sizes(affine).mean())


class _CarryInput(BaseInterfaceInputSpec):
    conformed_file = File(exists=True, mandatory=True, desc="tells where the raw scan is zero")
    scaled_file = File(exists=True, mandatory=True, desc="scaled scan on the raw grid")
    change_file = File(exists=True, mandatory=True, desc="change on the raw grid")
    tone = traits.Dict(desc="tone curve that the change comes on top of")
    distribution = traits.List(traits.Float, desc="quantiles that the brain shall have")
    distribution_mm = traits.Float(desc="voxel size at which it shall have them")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the raw grid")
    output_scale = traits.Dict(mandatory=True, desc="scale of the reference domain")


class _CarryOutput(TimedOutputSpec):
    out_file = File(desc="harmonized scan on the raw grid, in the reference domain's units")
    scaled_file = File(desc="the same on the common scale")


class CarryChange(TimedInterface):
    """Add the change to the raw grid's own detail and leave the common scale."""

    input_spec = _CarryInput
    output_spec = _CarryOutput

    def _run(self, cwd: Path) -> None:
        scaled, affine = load(self.inputs.scaled_file)
        change, _ = load(self.inputs.change_file)
        if tone := self._given("tone"):
            change = carried(scaled, change, ToneCurve.from_dict(tone))
        mask = load_mask(self.inputs.mask_file)
        if wanted := self._given("distribution"):
            blur = blur_to(nb.affines.voxel_sizes(affine), self.inputs.distribution_mm)
            change = distributed_change(scaled, change, mask, np.array(wanted), blur)
        zero = load(self.inputs.conformed_file)[0] == 0
        curve = brain_curve(scaled, scaled + change, mask)
        done = apply_change(scaled, change, mask, curve, keep_head=True, zero=zero)
        raw_units = IntensityScale.from_dict(self.inputs.output_scale).invert(done)
        raw_units[(zero & ~mask) | (raw_units < 0)] = 0
        self._results["out_file"] = store(raw_units, affine, cwd / "harmonized.nii")
        self._results["scaled_file"] = store(done, affine, cwd / "harmonized_scaled.nii")
