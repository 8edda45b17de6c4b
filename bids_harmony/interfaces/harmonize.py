"""The node that hands one scan to a method."""

from __future__ import annotations

from pathlib import Path

import nibabel as nb
import numpy as np

from bids_harmony.bids.write import save_nifti, write_json
from bids_harmony.errors import HarmonyError
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask, store


class _HarmonizeInput(BaseInterfaceInputSpec):
    in_file = File(exists=True, mandatory=True, desc="scaled scan on the model's grid")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the same grid")
    bundle = traits.Str(mandatory=True, desc="folder of the model bundle")
    bundle_hash = traits.Str(mandatory=True, desc="so that a changed bundle is noticed")
    modality = traits.Str(mandatory=True)
    site = traits.Str("n/a", usedefault=True)
    name = traits.Str("scan", usedefault=True, desc="for messages")
    random_seed = traits.Int(0, usedefault=True)


class _HarmonizeOutput(TimedOutputSpec):
    out_file = File(desc="harmonized scan, scaled, zero outside the mask")
    details = traits.Dict(desc="facts for the sidecar")
    warnings = traits.List(traits.Str, desc="sentences for the report")


class Harmonize(TimedInterface):
    """Make one scaled scan look like the reference domain."""

    input_spec = _HarmonizeInput
    output_spec = _HarmonizeOutput

    def _run(self, cwd: Path) -> None:
        from bids_harmony.methods.base import Volume
        from bids_harmony.methods.bundle import load_bundle

        bundle = load_bundle(Path(self.inputs.bundle))
        if bundle.hash != self.inputs.bundle_hash:
            raise HarmonyError(
                f"{self.inputs.bundle} changed while this run was using it; run again"
            )
        method = bundle.method
        data, affine = load(self.inputs.in_file)
        mask = load_mask(self.inputs.mask_file)
        if method.contract.masked:
            data = np.where(mask, data, np.float32(0))
        volume = Volume(
            data=data,
            mask=mask,
            modality=self.inputs.modality,
            spacing=tuple(float(z) for z in nb.affines.voxel_sizes(affine)),  # type: ignore[arg-type]
            site=self.inputs.site,
            name=self.inputs.name,
        )
        done = method.harmonize(volume, seed=self.inputs.random_seed)
        if done.data.shape != data.shape or not np.isfinite(done.data[mask]).all():
            raise HarmonyError(
                f"{self.inputs.name}: method {method.name} gave voxels that are not finite "
                "or another grid; report this to the method's authors"
            )
        self._results["out_file"] = store(done.data, affine, cwd / "harmonized.nii")
        self._results["details"] = dict(done.details)
        self._results["warnings"] = list(done.warnings)


class _StoreInput(BaseInterfaceInputSpec):
    scaled_file = File(exists=True, mandatory=True, desc="scaled scan on the model's grid")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the same grid")
    scale = traits.Dict(mandatory=True)
    out_stem = traits.Str(mandatory=True, desc="path without extension")
    key = traits.Dict(mandatory=True, desc="what makes the volume reusable")
    checksum = traits.Str("", usedefault=True)
    facts = traits.Dict(mandatory=True, desc="modality, site, name")


class StoreVolume(TimedInterface):
    """Keep one training volume in the work folder; its JSON comes last and marks the end."""

    _always_run = True
    input_spec = _StoreInput
    output_spec = TimedOutputSpec

    def _run(self, cwd: Path) -> None:
        stem = self.inputs.out_stem
        scaled, affine = load(self.inputs.scaled_file)
        mask = load_mask(self.inputs.mask_file)
        save_nifti(np.where(mask, scaled, 0), affine, Path(f"{stem}_scaled.nii"))
        save_nifti(mask, affine, Path(f"{stem}_mask.nii"), dtype=np.uint8)
        facts = {
            **self.inputs.facts,
            "key": {**self.inputs.key, "InputSHA256": self.inputs.checksum},
            "scale": dict(self.inputs.scale),
        }
        write_json(Path(f"{stem}.json"), facts)
