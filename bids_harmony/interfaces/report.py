"""Interfaces that gather what was done to a scan, score it and draw its part of the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from nibabel.processing import resample_from_to

from bids_harmony.bids.names import fragment_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import atomic_write_text
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    traits,
)
from bids_harmony.interfaces.files import load, load_given_mask, load_mask
from bids_harmony.reports.inputs import Histogram, Metric, Registration, ScanReport, Step
from bids_harmony.reports.page import render_failure, render_fragment
from bids_harmony.reports.scores import score_change, score_lesions

UNDRAWN = "the outputs are whole, but this report could not be drawn"
_QUANTILES = np.linspace(0.001, 0.999, 500)


class _ScoreInput(BaseInterfaceInputSpec):
    before_file = File(exists=True, mandatory=True, desc="scaled scan on the raw grid")
    after_file = File(exists=True, mandatory=True, desc="harmonized scan, scaled, raw grid")
    mask_file = File(exists=True, mandatory=True)
    reference_quantiles = traits.List(traits.Float, desc="of the reference domain, scaled")
    lesions_file = File(desc="marked lesions, on any grid in the scan's world space")


class _ScoreOutput(TimedOutputSpec):
    metrics = traits.List(traits.Dict, desc="rows of the metrics table")
    warnings = traits.List(traits.Str)


class Score(TimedInterface):
    """Did the scan come closer to the reference domain, and did the anatomy stay?"""

    input_spec = _ScoreInput
    output_spec = _ScoreOutput

    def _run(self, cwd: Path) -> None:
        before, affine = load(self.inputs.before_file)
        after, mask = load(self.inputs.after_file)[0], load_mask(self.inputs.mask_file)
        rows, warnings = score_change(before, after, mask, self._given("reference_quantiles"))
        if path := self._given("lesions_file"):
            lesions = load_given_mask(path, before.shape, affine, "mask of lesions")
            spacing = nb.affines.voxel_sizes(affine)
            more, doubts = score_lesions(before, after, mask, lesions, spacing)
            rows, warnings = [*rows, *more], [*warnings, *doubts]
        self._results["metrics"] = [asdict(row) for row in rows]
        self._results["warnings"] = warnings


class _RecordInput(BaseInterfaceInputSpec):
    settings = traits.Dict(mandatory=True, desc="method, model, version, seed, ...")
    conform_notes = traits.List(traits.Str)
    checksum = traits.Str()
    mask_source = traits.Str()
    mask_warnings = traits.List(traits.Str)
    registration_warnings = traits.List(traits.Str)
    scale = traits.Dict()
    output_scale = traits.Dict()
    details = traits.Dict()
    adaptation = traits.Dict()
    method_warnings = traits.List(traits.Str)
    metrics = traits.List(traits.Dict)
    score_warnings = traits.List(traits.Str)
    conform_seconds = traits.Float()
    mask_seconds = traits.Float()
    bias_seconds = traits.Float()
    registration_seconds = traits.Float()
    scale_seconds = traits.Float()
    harmonize_seconds = traits.Float()
    carry_seconds = traits.Float()


class _RecordOutput(TimedOutputSpec):
    record = traits.Dict(desc="everything that made the voxels, JSON-serialisable")
    seconds_by_step = traits.Dict(desc="durations, which are not part of the record")
    warnings = traits.List(traits.Str)


class Record(TimedInterface):
    """Gather what made the voxels; the same run gives the same record."""

    input_spec = _RecordInput
    output_spec = _RecordOutput

    def _run(self, cwd: Path) -> None:
        parts = ("mask_warnings", "registration_warnings", "method_warnings", "score_warnings")
        warnings = [*(self._given("conform_notes") or [])]
        warnings += [w for part in parts for w in self._given(part) or []]
        self._results["record"] = {
            **self.inputs.settings,
            "InputSHA256": self._given("checksum"),
            "Conform": self._given("conform_notes") or [],
            "BrainMask": self._given("mask_source"),
            "InputScale": self._given("scale"),
            "OutputScale": self._given("output_scale"),
            "Details": self._given("details") or {},
            **({"Adaptation": learned} if (learned := self._given("adaptation")) else {}),
            "Metrics": [
                {k: _finite(m[k]) for k in ("name", "before", "after", "unit")}
                for m in self._given("metrics") or []
            ],
            "Warnings": warnings,
        }
        names = [n for n in self.inputs.copyable_trait_names() if n.endswith("_seconds")]
        self._results["seconds_by_step"] = {
            n.removesuffix("_seconds"): self._given(n) for n in names if self._given(n) is not None
        }
        self._results["warnings"] = warnings


class _ReportInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True)
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    desc = traits.Str(mandatory=True)
    before_file = File(exists=True, mandatory=True)
    after_file = File(exists=True, mandatory=True)
    mask_file = File(exists=True, mandatory=True)
    bias_file = File(exists=True)
    template_file = File(exists=True, mandatory=True)
    in_template_file = File(exists=True, mandatory=True, desc="scan on the template's grid")
    template = traits.Str(mandatory=True)
    record = traits.Dict(mandatory=True)
    warnings = traits.List(traits.Str)
    seconds_by_step = traits.Dict()
    metrics = traits.List(traits.Dict)
    reference_quantiles = traits.List(traits.Float)
    method_title = traits.Str()
    citations = traits.List(traits.Str)
    methods_text = traits.Str()
    dseg_file = File(exists=True, desc="tissues that came with the harmonization")
    tissue_volumes = traits.Dict(desc="mL of each tissue")


class _ReportOutput(TimedOutputSpec):
    out_file = traits.Str(desc="fragment below sub-XX/figures")


class ReportScan(TimedInterface):
    """Draw one scan's section of the participant's page; a failure here loses no output."""

    _always_run = True
    input_spec = _ReportInput
    output_spec = _ReportOutput

    def _run(self, cwd: Path) -> None:
        scan: Scan = self.inputs.scan
        path = fragment_path(Path(self.inputs.out_dir), scan, self.inputs.desc)
        try:
            fragment = render_fragment(self._report())
        except Exception as error:  # noqa: BLE001  the scan is harmonized, whatever its picture
            fragment = render_failure(
                scan.stem,
                f"{UNDRAWN}: {type(error).__name__}: {error}",
                desc=self.inputs.desc,
                method=self.inputs.record["Method"],
                site=scan.site,
            )
        atomic_write_text(path, fragment)
        self._results["out_file"] = str(path)

    def _report(self) -> ScanReport:
        scan: Scan = self.inputs.scan
        record = self.inputs.record
        before, affine = load(self.inputs.before_file)
        after, _ = load(self.inputs.after_file)
        mask = load_mask(self.inputs.mask_file)
        return ScanReport(
            stem=scan.stem,
            desc=self.inputs.desc,
            modality=scan.suffix,
            input_name=str(scan.path.relative_to(self.inputs.bids_dir)),
            method=record["Method"],
            method_title=self._given("method_title") or record["Method"],
            model_name=record["ModelName"],
            model_hash=record["ModelHash"],
            reference=record["Reference"],
            site=scan.site,
            site_source=scan.site_source,
            affine=affine,
            before=before,
            after=after,
            mask=mask,
            bias=self._bias(before.shape, affine),
            tissues=self._tissues(),
            tissue_volumes=dict(self._given("tissue_volumes") or {}),
            registration=self._registration(),
            histogram=self._histogram(before[mask], after[mask]),
            steps=tuple(self._steps()),
            metrics=tuple(Metric(**m) for m in self._given("metrics") or []),
            warnings=tuple(self._given("warnings") or []),
            methods=self._given("methods_text") or "",
            citations=tuple(self._given("citations") or []),
            sidecar=dict(record),
        )

    def _bias(self, shape: tuple[int, ...], affine: Any) -> Any:
        file = self._given("bias_file")
        if file is None:
            return None
        img: Any = nb.loadsave.load(file)
        return np.asanyarray(
            resample_from_to(img, (shape, affine), order=1, mode="nearest").dataobj, np.float32
        )

    def _tissues(self) -> Any:
        file = self._given("dseg_file")
        return None if file is None else load(file)[0].astype(np.uint8)

    def _registration(self) -> Registration:
        template, affine = load(self.inputs.template_file)
        return Registration(
            template=template,
            scan=load(self.inputs.in_template_file)[0],
            affine=affine,
            template_mask=template > 0,
            name=self.inputs.template,
        )

    def _histogram(self, before: Any, after: Any) -> Histogram:
        reference = self._given("reference_quantiles")
        return Histogram(
            before=np.quantile(before, _QUANTILES),
            after=np.quantile(after, _QUANTILES),
            reference=np.asarray(reference) if reference else None,
        )

    def _steps(self) -> list[Step]:
        record, seconds = self.inputs.record, self._given("seconds_by_step") or {}
        bias = record["BiasField"]
        adapted, details = record.get("Adaptation", {"scope": "none"}), record.get("Details", {})
        to = {"site": f", adapted to the site {adapted.get('site')}",
              "scan": ", adapted to this scan"}.get(adapted["scope"], "")  # fmt: skip
        kept = ", the brain's histogram kept" if details.get("keep_distribution") else ""
        rows = (
            ("conform", "; ".join(record["Conform"]) or "nothing to mend", "nibabel"),
            ("mask", f"brain mask: {record['BrainMask']}", ""),
            ("bias", bias, "N4 (antspyx)"),
            ("registration", record["Registration"], "antspyx"),
            ("scale", f"{record['InputScale']['kind']} intensity scale", "bids_harmony"),
            ("harmonize", f"{record['Method']} to {record['Reference']}{to}", record["ModelName"]),
            ("carry", f"change carried to the raw grid{kept}", "bids_harmony"),
        )
        return [
            Step(
                name, action, tool, seconds.get(name), "computed" if name in seconds else "reused"
            )
            for name, action, tool in rows
        ]


def _finite(value: Any) -> Any:
    """JSON knows no NaN: an undefined score is null."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
