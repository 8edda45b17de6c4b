"""The path of one scan: preprocess -> harmonize -> back to the raw grid -> derivatives, report."""

from __future__ import annotations

from typing import Any

from nipype.interfaces.utility import IdentityInterface, Merge
from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import Scan
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.ants import ApplyTransform
from bids_harmony.interfaces.bids import WriteHarmonized
from bids_harmony.interfaces.harmonize import Harmonize
from bids_harmony.interfaces.image import CarryChange, Change
from bids_harmony.interfaces.report import Record, ReportScan, Score
from bids_harmony.interfaces.tissues import WriteTissues, tissue_label
from bids_harmony.workflows.preprocess import init_preprocess_wf
from bids_harmony.workflows.settings import Anchor, Place, Preprocessing, Target, scan_settings


def workflow_name(scan: Scan) -> str:
    """Name of a scan's workflow, which is also its work folder; ``a+`` and ``a`` differ."""
    return scan.stem.replace("-", "").replace("+", "__") + "_wf"


def model_inputs(target: Target, prep: Preprocessing) -> dict[str, Any]:
    """Inputs of every node that runs a model."""
    by = target.segmentation
    return {
        "bundle": str(target.bundle),
        "bundle_hash": target.hash,
        "random_seed": prep.seed,
        "device": target.device,
        "num_threads": prep.threads,
        "use_gpu": target.device != "cpu",
        "segmentation": str(by.path) if by else "",
        "segmentation_hash": by.sha256 if by else "",
        "options": dict(target.options),
    }


def init_harmonize_wf(
    *,
    scan: Scan,
    prep: Preprocessing,
    target: Target,
    gigabytes: float,
    name: str = "harmonize_wf",
) -> Workflow:
    """Method on its own grid, and its change carried to the raw grid.

    Inputs: ``conformed_file, scaled_file, mask_file, transform_file``; outputs: ``native_file``
    (reference domain's units), ``native_scaled_file``, ``details``, ``adaptation``,
    ``warnings`` and durations.
    """
    workflow = Workflow(name=name)
    inputnode = Node(
        IdentityInterface(fields=["conformed_file", "scaled_file", "mask_file", "transform_file"]),
        name="inputnode",
    )
    outputnode = Node(
        IdentityInterface(
            fields=["native_file", "native_scaled_file", "details", "adaptation", "warnings",
                    "harmonize_seconds", "carry_seconds", *TISSUES]
        ),
        name="outputnode",
    )  # fmt: skip
    adapt = target.adapt_to(scan.site, scan.suffix)
    others = target.others.get(scan.stem, {})
    harmonize = Node(
        Harmonize(
            **model_inputs(target, prep),
            modality=scan.suffix,
            site=scan.site,
            name=scan.stem,
            others={m: str(other.stem) for m, other in others.items()},
            others_key={m: other.made_of for m, other in others.items()},
            adapt=adapt.scope,
            adapt_why=adapt.why,
            adaptation=adapt.folder,
            adaptation_hash=adapt.hash,
        ),
        name="harmonize",
        n_procs=prep.threads,
        mem_gb=gigabytes + target.memory_gb,
    )
    change = Node(Change(resampled=not target.native_grid), name="change", mem_gb=gigabytes)
    carry = Node(
        CarryChange(output_scale=dict(target.output_scale[scan.suffix])),
        name="carry",
        mem_gb=2 * gigabytes,
    )
    workflow.connect([
        (harmonize, change, [
            ("out_file", "after_file"), ("keep_distribution", "keep_distribution"),
        ]),
        (change, carry, [
            ("tone", "tone"), ("distribution", "distribution"), ("spacing", "distribution_mm"),
        ]),
        (inputnode, carry, [
            ("conformed_file", "conformed_file"), ("scaled_file", "scaled_file"),
            ("mask_file", "mask_file"),
        ]),
        (harmonize, outputnode, [
            ("details", "details"), ("adaptation", "adaptation"), ("warnings", "warnings"),
            ("seconds", "harmonize_seconds"),
        ]),
        (carry, outputnode, [
            ("out_file", "native_file"), ("scaled_file", "native_scaled_file"),
            ("seconds", "carry_seconds"),
        ]),
    ])  # fmt: skip
    _connect_grid(workflow, prep, target, gigabytes)
    if target.segments:
        _connect_tissues(workflow, prep, target, gigabytes)
    return workflow


def _connect_grid(
    workflow: Workflow, prep: Preprocessing, target: Target, gigabytes: float
) -> None:
    """Give the method its grid, and bring the change back from it."""
    inputnode, harmonize, change, carry = (
        workflow.get_node(n) for n in ("inputnode", "harmonize", "change", "carry")
    )
    if target.native_grid:
        for node, scan_field in ((harmonize, "in_file"), (change, "before_file")):
            workflow.connect(inputnode, "scaled_file", node, scan_field)
            workflow.connect(inputnode, "mask_file", node, "mask_file")
        workflow.connect(change, "out_file", carry, "change_file")
        return
    common = {"num_threads": prep.threads, "random_seed": prep.seed}

    def apply(name: str, interpolation: str, **more: object) -> Node:
        interface = ApplyTransform(interpolation=interpolation, **common, **more)
        return Node(interface, name=name, n_procs=prep.threads, mem_gb=gigabytes)

    grid = str(target.grid_file)
    to_grid = apply("to_grid", "linear", reference_file=grid)
    mask_to_grid = apply("mask_to_grid", "nearestNeighbor", reference_file=grid)
    change_to_raw = apply("change_to_raw", "linear", invert=[True])
    workflow.connect([
        (inputnode, to_grid, [("scaled_file", "in_file"), ("transform_file", "transforms")]),
        (inputnode, mask_to_grid, [("mask_file", "in_file"), ("transform_file", "transforms")]),
        (to_grid, harmonize, [("out_file", "in_file")]),
        (mask_to_grid, harmonize, [("out_file", "mask_file")]),
        (to_grid, change, [("out_file", "before_file")]),
        (mask_to_grid, change, [("out_file", "mask_file")]),
        (change, change_to_raw, [("out_file", "in_file")]),
        (inputnode, change_to_raw, [
            ("conformed_file", "reference_file"), ("transform_file", "transforms"),
        ]),
        (change_to_raw, carry, [("out_file", "change_file")]),
    ])  # fmt: skip


def _connect_tissues(
    workflow: Workflow, prep: Preprocessing, target: Target, gigabytes: float
) -> None:
    """Bring the probability of each tissue from the method's grid to the raw grid."""
    inputnode, harmonize, outputnode = (
        workflow.get_node(n) for n in ("inputnode", "harmonize", "outputnode")
    )
    for tissue in TISSUES:
        if target.native_grid:
            workflow.connect(harmonize, tissue, outputnode, tissue)
            continue
        to_raw = Node(
            ApplyTransform(
                interpolation="linear",
                invert=[True],
                num_threads=prep.threads,
                random_seed=prep.seed,
            ),
            name=f"{tissue}_to_raw",
            n_procs=prep.threads,
            mem_gb=gigabytes,
        )
        workflow.connect([
            (harmonize, to_raw, [(tissue, "in_file")]),
            (inputnode, to_raw, [
                ("conformed_file", "reference_file"), ("transform_file", "transforms"),
            ]),
            (to_raw, outputnode, [("out_file", tissue)]),
        ])  # fmt: skip


def init_scan_wf(
    *,
    scan: Scan,
    prep: Preprocessing,
    target: Target | None,
    place: Place,
    given: Precomputed,
    anchor: Anchor | None = None,
    gigabytes: float,
) -> Workflow:
    """Everything that is done to one scan; without a target only the preprocessing is."""
    workflow = Workflow(name=workflow_name(scan))
    preprocess_wf = init_preprocess_wf(
        scan=scan,
        prep=prep,
        place=place,
        given=given,
        anchor=anchor,
        scale_kind=target.contract.scale if target else "robust",
        gigabytes=gigabytes,
        leave_out=() if target else ("scale", "to_template"),
    )
    if target is None:
        workflow.add_nodes([preprocess_wf])
        return workflow
    harmonize_wf = init_harmonize_wf(scan=scan, prep=prep, target=target, gigabytes=gigabytes)
    workflow.connect([
        (preprocess_wf, harmonize_wf, [
            (f"outputnode.{f}", f"inputnode.{f}")
            for f in ("conformed_file", "scaled_file", "mask_file", "transform_file")
        ]),
    ])  # fmt: skip
    record = _connect_record(workflow, scan, prep, target, place, given, gigabytes)
    _connect_outputs(workflow, scan, prep, place, gigabytes, record)
    _connect_report(workflow, scan, prep, target, place, gigabytes, record)
    if target.segments:
        _connect_segmentation(workflow, scan, target, place, gigabytes)
    return workflow


def _connect_record(
    workflow: Workflow,
    scan: Scan,
    prep: Preprocessing,
    target: Target,
    place: Place,
    given: Precomputed,
    gigabytes: float,
) -> Node:
    """Scores, and the record of what made the voxels."""
    preprocess_wf, harmonize_wf = (workflow.get_node(n) for n in ("preprocess_wf", "harmonize_wf"))
    score = Node(
        Score(reference_quantiles=target.reference_quantiles.get(scan.suffix, [])),
        name="score",
        mem_gb=2 * gigabytes,
    )
    if given.lesions:
        score.inputs.lesions_file = str(given.lesions)
    settings = scan_settings(scan, prep, target, place, given)
    record = Node(
        Record(settings=settings, output_scale=dict(target.output_scale[scan.suffix])),
        name="record",
        mem_gb=0.1,
    )
    same = ("conform_notes", "checksum", "mask_source", "mask_warnings", "registration_warnings",
            "scale", "conform_seconds", "mask_seconds", "scale_seconds")  # fmt: skip
    passed = [(f"outputnode.{f}", f) for f in same]
    if prep.bias_field:
        passed.append(("outputnode.bias_seconds", "bias_seconds"))
    if not given.to_template:
        passed.append(("outputnode.registration_seconds", "registration_seconds"))
    workflow.connect([
        (preprocess_wf, score, [
            ("outputnode.scaled_file", "before_file"), ("outputnode.mask_file", "mask_file"),
        ]),
        (harmonize_wf, score, [("outputnode.native_scaled_file", "after_file")]),
        (preprocess_wf, record, passed),
        (harmonize_wf, record, [
            ("outputnode.details", "details"), ("outputnode.adaptation", "adaptation"),
            ("outputnode.warnings", "method_warnings"),
            ("outputnode.harmonize_seconds", "harmonize_seconds"),
            ("outputnode.carry_seconds", "carry_seconds"),
        ]),
        (score, record, [("metrics", "metrics"), ("warnings", "score_warnings")]),
    ])  # fmt: skip
    return record


def _connect_outputs(
    workflow: Workflow,
    scan: Scan,
    prep: Preprocessing,
    place: Place,
    gigabytes: float,
    record: Node,
) -> None:
    """Derivatives in the native and template spaces."""
    preprocess_wf, harmonize_wf = (workflow.get_node(n) for n in ("preprocess_wf", "harmonize_wf"))
    spaces = [(s.name, s.res) for s in place.spaces if s.name != "native"]
    write = Node(
        WriteHarmonized(
            scan=scan,
            bids_dir=str(place.bids_dir),
            out_dir=str(place.out_dir),
            desc=place.desc,
            write_native=len(spaces) < len(place.spaces),
            spaces=spaces,
        ),
        name="write",
        mem_gb=gigabytes,
    )
    workflow.connect([
        (record, write, [("record", "record")]),
        (preprocess_wf, write, [("outputnode.stripped", "stripped")]),
        (harmonize_wf, write, [("outputnode.native_file", "native_file")]),
    ])  # fmt: skip
    if not spaces:
        return
    merge = Node(Merge(len(spaces)), name="merge_spaces", run_without_submitting=True)
    workflow.connect(merge, "out", write, "space_files")
    for index, key in enumerate(spaces, start=1):
        to_space = Node(
            ApplyTransform(
                reference_file=str(place.space_files[key]),
                interpolation="lanczosWindowedSinc",
                num_threads=prep.threads,
                random_seed=prep.seed,
            ),
            name=f"to_space_{index}",
            n_procs=prep.threads,
            mem_gb=2 * gigabytes,
        )
        workflow.connect([
            (harmonize_wf, to_space, [("outputnode.native_file", "in_file")]),
            (preprocess_wf, to_space, [("outputnode.transform_file", "transforms")]),
            (to_space, merge, [("out_file", f"in{index}")]),
        ])  # fmt: skip


def _connect_report(
    workflow: Workflow,
    scan: Scan,
    prep: Preprocessing,
    target: Target,
    place: Place,
    gigabytes: float,
    record: Node,
) -> None:
    """The scan's section of the participant's page."""
    preprocess_wf, harmonize_wf, score = (
        workflow.get_node(n) for n in ("preprocess_wf", "harmonize_wf", "score")
    )
    report = Node(
        ReportScan(
            scan=scan,
            bids_dir=str(place.bids_dir),
            out_dir=str(place.out_dir),
            desc=place.desc,
            template=prep.template,
            template_file=str(prep.template_file),
            reference_quantiles=target.reference_quantiles.get(scan.suffix, []),
            method_title=target.title,
            citations=list(target.citations),
            methods_text=target.text(prep),
        ),
        name="report",
        mem_gb=3 * gigabytes,
    )
    passed = ["mask_file", "in_template_file"] + ["bias_file"] * prep.bias_field
    workflow.connect([
        (preprocess_wf, report, [(f"outputnode.{f}", f) for f in passed]),
        (preprocess_wf, report, [("outputnode.scaled_file", "before_file")]),
        (harmonize_wf, report, [("outputnode.native_scaled_file", "after_file")]),
        (record, report, [
            ("record", "record"), ("warnings", "warnings"), ("seconds_by_step", "seconds_by_step"),
        ]),
        (score, report, [("metrics", "metrics")]),
    ])  # fmt: skip


def _connect_segmentation(
    workflow: Workflow, scan: Scan, target: Target, place: Place, gigabytes: float
) -> None:
    """Tissues as derivatives, and in the report."""
    preprocess_wf, harmonize_wf, record, report = (
        workflow.get_node(n) for n in ("preprocess_wf", "harmonize_wf", "record", "report")
    )
    write = Node(
        WriteTissues(
            scan=scan,
            bids_dir=str(place.bids_dir),
            out_dir=str(place.out_dir),
            label=tissue_label(target.method, place.desc),
        ),
        name="write_tissues",
        mem_gb=gigabytes,
    )
    workflow.connect([
        (harmonize_wf, write, [(f"outputnode.{t}", t) for t in TISSUES]),
        (preprocess_wf, write, [("outputnode.mask_file", "mask_file")]),
        (record, write, [("record", "record")]),
        (write, report, [("dseg_file", "dseg_file"), ("volumes", "tissue_volumes")]),
    ])  # fmt: skip
