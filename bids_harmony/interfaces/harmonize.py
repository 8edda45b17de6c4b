"""The nodes that hand scans to a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np

from bids_harmony.bids.scan import UNKNOWN_SITE
from bids_harmony.errors import HarmonyError
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask, store


class _ModelInput(BaseInterfaceInputSpec):
    bundle = traits.Str(mandatory=True, desc="folder of the model bundle")
    bundle_hash = traits.Str(mandatory=True, desc="so that a changed bundle is noticed")
    random_seed = traits.Int(0, usedefault=True)
    device = traits.Str("cpu", usedefault=True, desc="where networks run")
    num_threads = traits.Int(1, usedefault=True)
    use_gpu = traits.Bool(False, usedefault=True, desc="so that one node has the GPU at a time")
    segmentation = traits.Str("", usedefault=True, desc="file of a network that bounds adaptation")
    segmentation_hash = traits.Str("", usedefault=True, desc="so that a changed one is noticed")
    options = traits.Dict({}, usedefault=True, desc="values of the method's own options")


class _HarmonizeInput(_ModelInput):
    in_file = File(exists=True, mandatory=True, desc="scaled scan on the model's grid")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the same grid")
    modality = traits.Str(mandatory=True)
    site = traits.Str(UNKNOWN_SITE, usedefault=True)
    name = traits.Str("scan", usedefault=True, desc="for messages")
    others = traits.Dict({}, usedefault=True, desc="stored volumes of its session, by modality")
    others_key = traits.Dict({}, usedefault=True, desc="so that changed ones are noticed")
    adapt = traits.Enum("none", "site", "scan", usedefault=True, desc="what is adapted to")
    adapt_why = traits.Str("", usedefault=True, desc="why, in words")
    adaptation = traits.Str("", usedefault=True, desc="folder of the site's adaptation")
    adaptation_hash = traits.Str("", usedefault=True, desc="so that a changed one is noticed")


class _HarmonizeOutput(TimedOutputSpec):
    out_file = File(desc="harmonized scan, scaled, zero outside the mask")
    details = traits.Dict(desc="facts for the sidecar")
    warnings = traits.List(traits.Str, desc="sentences for the report")
    adaptation = traits.Dict(desc="what the method learned from the site or scan")
    keep_distribution = traits.Bool(desc="the brain's intensities keep it on the raw grid")
    CSF = File(desc="probability of each tissue, from methods that segment")
    GM = File()
    WM = File()


class Harmonize(TimedInterface):
    """Make one scaled scan look like the reference domain."""

    input_spec = _HarmonizeInput
    output_spec = _HarmonizeOutput

    def _run(self, cwd: Path) -> None:
        from bids_harmony.methods.base import Volume

        method = _placed(self.inputs)
        data, affine = load(self.inputs.in_file)
        mask = load_mask(self.inputs.mask_file)
        if method.contract.masked:
            data = np.where(mask, data, np.float32(0))
        volume = Volume(
            data=data,
            mask=mask,
            modality=self.inputs.modality,
            spacing=tuple(float(z) for z in nb.affines.voxel_sizes(affine)),  # type: ignore[arg-type]
            axes=nb.orientations.aff2axcodes(affine),
            site=self.inputs.site,
            name=self.inputs.name,
            others=_others(self.inputs.others),
        )
        method, adaptation, warnings = self._adapted(method, volume)
        done = method.harmonize(volume, seed=self.inputs.random_seed)
        if done.data.shape != data.shape or not np.isfinite(done.data[mask]).all():
            raise HarmonyError(
                f"{self.inputs.name}: method {method.name} gave voxels that are not finite "
                "or another grid; report this to the method's authors"
            )
        shares = {} if done.tissues is None else dict(zip(TISSUES, done.tissues, strict=True))
        for tissue, share in shares.items():
            if share.shape != data.shape or not np.isfinite(share).all():
                raise HarmonyError(
                    f"{self.inputs.name}: method {method.name} gave tissues that are not finite "
                    "or on another grid; report this to the method's authors"
                )
            self._results[tissue] = store(share, affine, cwd / f"{tissue}.nii")
        self._results["out_file"] = store(done.data, affine, cwd / "harmonized.nii")
        self._results["keep_distribution"] = bool(done.keep_distribution)
        kept = {"keep_distribution": True} if done.keep_distribution else {}
        self._results["details"] = {**done.details, **kept}
        self._results["warnings"] = [*warnings, *done.warnings]
        self._results["adaptation"] = adaptation

    def _adapted(self, method: Any, volume: Any) -> tuple[Any, dict[str, Any], list[str]]:
        """The method as adapted to the scan's site or the scan, what was learned, warnings."""
        scope, why = self.inputs.adapt, self.inputs.adapt_why
        if scope == "none":
            return method, {"scope": "none", "reason": why} if why else {}, []
        warnings = []
        if scope == "scan":
            found = method.adapt([volume], seed=self.inputs.random_seed, **_bounds(self.inputs))
            words: dict[str, Any] = {"scope": "scan", "reason": why}
            if volume.site == UNKNOWN_SITE:
                warnings = [
                    "The scan's site is unknown: the model was adapted to this scan alone."
                ]
        else:
            from bids_harmony.methods.adaptation import load_adaptation

            stored = load_adaptation(Path(self.inputs.adaptation))
            if stored.hash != self.inputs.adaptation_hash:
                raise HarmonyError(
                    f"{self.inputs.adaptation} changed while this run was using it; run again"
                )
            found = stored.adaptation
            words = {"scope": "site", "reason": why, "hash": stored.hash}
            words["site"] = stored.facts["site"]
            words["scans"] = [scan["file"] for scan in stored.facts["scans"]]
        return method.adapted(found), {**found.details, **words}, warnings


def _others(stems: Mapping[str, str]) -> dict[str, Any]:
    """Stored volumes by modality."""
    if not stems:
        return {}
    from bids_harmony.interfaces.volumes import StoredVolumes

    modalities = sorted(stems)
    volumes = StoredVolumes([Path(stems[m]) for m in modalities])
    return dict(zip(modalities, volumes, strict=True))


class _AdaptInput(_ModelInput):
    stems = traits.List(traits.Str, mandatory=True, desc="stored volumes of one site and modality")
    folder = traits.Str(mandatory=True, desc="where the adaptation is kept")
    facts = traits.Dict(mandatory=True, desc="site, modality, scans, settings, model")


class AdaptToSite(TimedInterface):
    """Let a trained method learn from the scans of a site, and keep what it learned."""

    _always_run = True
    input_spec = _AdaptInput
    output_spec = TimedOutputSpec

    def _run(self, cwd: Path) -> None:
        from bids_harmony.interfaces.volumes import StoredVolumes
        from bids_harmony.methods.adaptation import save_adaptation

        method = _placed(self.inputs)
        volumes = StoredVolumes([Path(stem) for stem in self.inputs.stems])
        bounds = _bounds(self.inputs)
        adaptation = method.adapt(volumes, seed=self.inputs.random_seed, **bounds)
        save_adaptation(Path(self.inputs.folder), adaptation, facts=dict(self.inputs.facts))


def _placed(inputs: Any) -> Any:
    """The method of the bundle that the run began with, on its device."""
    from bids_harmony.methods.base import NeuralMethod
    from bids_harmony.methods.bundle import load_bundle

    bundle = load_bundle(Path(inputs.bundle))
    if bundle.hash != inputs.bundle_hash:
        raise HarmonyError(f"{inputs.bundle} changed while this run was using it; run again")
    if isinstance(bundle.method, NeuralMethod):
        bundle.method.place_on(inputs.device, inputs.num_threads)
        bundle.method.take_options(dict(inputs.options))
    return bundle.method


def _bounds(inputs: Any) -> dict[str, Any]:
    """The segmentation network that the run began with, for `adapt`; empty without one."""
    if not inputs.segmentation:
        return {}
    from bids_harmony.methods.task_entropy import read_segmentation

    found = read_segmentation(Path(inputs.segmentation))
    if found.sha256 != inputs.segmentation_hash:
        raise HarmonyError(f"{inputs.segmentation} changed while this run was using it; run again")
    return {"segmentation": found}
