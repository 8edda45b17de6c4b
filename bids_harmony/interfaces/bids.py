"""Write one scan's derivatives; the harmonized scan's sidecar comes last and marks the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np

from bids_harmony.bids.dataset import bids_uri
from bids_harmony.bids.names import derivative_path, sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import atomic_write_bytes, save_nifti, write_json
from bids_harmony.config import DEFAULT_TEMPLATE
from bids_harmony.errors import HarmonyError
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    isdefined,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask

NOT_PROPAGATED = {"SkullStripped", "Sources", "RawSources", "SpatialReference", "Resolution"}


class _PreprocessedInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True)
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    template = traits.Str(mandatory=True)
    fingerprint = traits.Dict(mandatory=True, desc="what makes these files reusable")
    mask_file = File(exists=True, mandatory=True)
    mask_source = traits.Str("", usedefault=True)
    mask_warnings = traits.List(traits.Str)
    given = traits.Str("", usedefault=True, desc="the user's mask in words, if it is the user's")
    registered_to = traits.Str("", usedefault=True, desc="the scan's anchor in words")
    unchanged = traits.Bool(False, usedefault=True, desc="all comes from an earlier run's files")
    registration_warnings = traits.List(traits.Str)
    checksum = traits.Str("", usedefault=True, desc="sha256 of the raw file")
    bias_file = File(exists=True, desc="coarse bias field")
    transform_file = File(exists=True, desc="ITK text transform, scan to template")


class _PreprocessedOutput(TimedOutputSpec):
    out_files = traits.List(traits.Str)


class WritePreprocessed(TimedInterface):
    """Brain mask, bias field, transform as derivatives; a later run reuses them."""

    _always_run = True
    input_spec = _PreprocessedInput
    output_spec = _PreprocessedOutput

    def _run(self, cwd: Path) -> None:
        inputs = self.inputs
        if inputs.unchanged:  # another job may be reading them
            self._results["out_files"] = []
            return
        scan: Scan = inputs.scan
        out_dir = Path(inputs.out_dir)
        source = bids_uri(scan.path, Path(inputs.bids_dir))
        made = {**inputs.fingerprint, "InputSHA256": inputs.checksum}
        common = {"Sources": [source], "Preprocessing": made, "Given": inputs.given}
        written = []
        # what lies here belongs together while the mask has a sidecar, which is written last
        mask = derivative_path(out_dir, scan, desc="brain", suffix="mask")
        sidecar_path(mask).unlink(missing_ok=True)
        if isdefined(inputs.transform_file):
            path = derivative_path(
                out_dir, scan, from_=scan.suffix, to=inputs.template, extension=".txt"
            )
            atomic_write_bytes(path, Path(inputs.transform_file).read_bytes())
            anchor = [scan.anchor] if scan.anchor and inputs.registered_to else []
            words = {
                "Sources": [source, *(bids_uri(a.path, Path(inputs.bids_dir)) for a in anchor)],
                "RegisteredTo": inputs.registered_to,
                "Warnings": self._given("registration_warnings") or [],
            }
            write_json(sidecar_path(path), common | words)
            written.append(str(path))
        if isdefined(inputs.bias_file):
            path = derivative_path(out_dir, scan, desc="n4", suffix="biasfield")
            data, affine = load(inputs.bias_file)
            save_nifti(data, affine, path)
            words = {"Description": "N4 bias field on a coarse grid", "SkullStripped": False}
            write_json(sidecar_path(path), common | words)
            written.append(str(path))
        save_nifti(load_mask(inputs.mask_file), load(inputs.mask_file)[1], mask, dtype=np.uint8)
        words = {
            "Type": "Brain",
            "Description": inputs.mask_source,
            "Warnings": self._given("mask_warnings") or [],
        }
        write_json(sidecar_path(mask), common | words)
        self._results["out_files"] = [*written, str(mask)]


def spatial_reference(template: str) -> str:
    """Where a template comes from, in words."""
    if template == DEFAULT_TEMPLATE:
        return "ICBM 2009a nonlinear symmetric (MNI152NLin2009aSym) as shipped with nilearn"
    return f"TemplateFlow tpl-{template}_res-01_T1w"


class _WriteInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True)
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    desc = traits.Str(mandatory=True)
    record = traits.Dict(mandatory=True, desc="what made the voxels")
    stripped = traits.Bool(False, usedefault=True)
    native_file = File(exists=True, mandatory=True, desc="harmonized scan on the raw grid")
    write_native = traits.Bool(True, usedefault=True)
    space_files = traits.List(File(exists=True), desc="harmonized scan in the output spaces")
    spaces = traits.List(traits.Tuple(traits.Str, traits.Str), desc="(template, res) of each")


class WriteHarmonized(TimedInterface):
    """The harmonized scan in every output space, with sidecars."""

    _always_run = True
    input_spec = _WriteInput
    output_spec = _PreprocessedOutput

    def _run(self, cwd: Path) -> None:
        scan: Scan = self.inputs.scan
        sidecar = self._sidecar(scan)
        files = list(self.inputs.space_files) if isdefined(self.inputs.space_files) else []
        written = [
            self._write(file, sidecar, space, res)
            for file, (space, res) in zip(files, self.inputs.spaces or [], strict=True)
        ]
        if self.inputs.write_native:
            written.append(self._write(self.inputs.native_file, sidecar))
        self._results["out_files"] = written

    def _sidecar(self, scan: Scan) -> dict[str, Any]:
        raw = {k: v for k, v in scan.metadata.items() if k not in NOT_PROPAGATED and _is_json(v)}
        record = self.inputs.record
        return {
            **raw,
            "Description": (
                f"{scan.suffix} scan harmonized with {record['Method']} to the reference domain "
                f"{record['Reference']}; acquisition fields are those of the raw scan and no "
                "longer describe the contrast."
            ),
            "Sources": [bids_uri(scan.path, Path(self.inputs.bids_dir))],
            "SkullStripped": bool(self.inputs.stripped),
            "Harmonization": record,
        }

    def _write(
        self, file: str, sidecar: dict[str, Any], space: str | None = None, res: str | None = None
    ) -> str:
        img: Any = nb.loadsave.load(file)
        data, affine = load(file)
        if not np.isfinite(data).all() or (not space and data.min() < 0):
            raise HarmonyError(f"{file}: voxels are not finite or negative; this is a bug")
        data = np.maximum(data, 0)  # windowed-sinc interpolation undershoots at edges
        path = derivative_path(
            Path(self.inputs.out_dir),
            self.inputs.scan,
            space=space,
            res=res or None,
            desc=self.inputs.desc,
        )
        extra: dict[str, Any] = {}
        if space:
            size = "x".join(f"{z:g}" for z in img.header.get_zooms()[:3])
            extra = {"Resolution": f"{space}, {size} mm voxels"}
            if res:
                extra["Resolution"] = {res: extra["Resolution"]}
            extra["SpatialReference"] = spatial_reference(space)
        raw: Any = nb.loadsave.load(self.inputs.scan.path)
        header = None if space else raw.header
        # without its sidecar a new image is never taken for a finished one
        sidecar_path(path).unlink(missing_ok=True)
        save_nifti(data, affine, path, header=header)
        write_json(sidecar_path(path), sidecar | extra)
        return str(path)


def _is_json(value: Any) -> bool:
    """Whether JSON can hold a value: Python reads NaN in a sidecar, but may not write it."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
