"""Raw scan -> conformed, masked, bias-corrected, registered and on the common intensity scale."""

from __future__ import annotations

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import Scan
from bids_harmony.interfaces.ants import ApplyTransform, N4BiasField, RigidRegistration
from bids_harmony.interfaces.bids import WritePreprocessed
from bids_harmony.interfaces.coregister import CoRegister
from bids_harmony.interfaces.image import Conform, ScaleIntensity
from bids_harmony.interfaces.mask import SelectBrainMask
from bids_harmony.workflows.settings import (
    EARLIER_RUN,
    Anchor,
    Place,
    Preprocessing,
    given_files,
)

PREPROCESSED = (
    "conformed_file", "conform_notes", "checksum", "conform_seconds",
    "mask_file", "mask_source", "mask_warnings", "stripped", "mask_seconds",
    "bias_file", "bias_seconds",
    "transform_file", "registration_seconds", "registration_warnings", "in_template_file",
    "scaled_file", "scale", "scale_seconds",
)  # fmt: skip


def init_preprocess_wf(
    *,
    scan: Scan,
    prep: Preprocessing,
    place: Place,
    given: Precomputed,
    anchor: Anchor | None = None,
    scale_kind: str,
    gigabytes: float,
    leave_out: tuple[str, ...] = (),
    name: str = "preprocess_wf",
) -> Workflow:
    """Conform, brain mask, bias field, registration and intensity scale of one scan.

    Outputs are the fields of `PREPROCESSED`. A precomputed mask or transform replaces its node;
    `leave_out` names nodes whose results nobody wants (``scale``, ``to_template``). With an
    `anchor` the scan is registered to it, and goes its way to the template.
    """
    workflow = Workflow(name=name)
    outputnode = Node(IdentityInterface(fields=list(PREPROCESSED)), name="outputnode")
    common = {"num_threads": prep.threads, "random_seed": prep.seed}
    conform = Node(Conform(in_file=str(scan.path)), name="conform", mem_gb=gigabytes)
    mask = Node(
        SelectBrainMask(
            name=scan.stem,
            modality=scan.suffix,
            mode=prep.skull_strip,
            **common,
        ),
        name="mask",
        n_procs=prep.threads,
        mem_gb=gigabytes + 0.5,
    )
    mask.inputs.given_warnings = given.notes
    mask.inputs.given_doubts = given.doubts
    if given.mask:
        mask.inputs.given_file = str(given.mask)
        mask.inputs.given_source = given.sources["mask"]
    scale = Node(ScaleIntensity(kind=scale_kind, name=scan.stem), name="scale", mem_gb=gigabytes)
    write = Node(
        WritePreprocessed(
            scan=scan,
            bids_dir=str(place.bids_dir),
            out_dir=str(place.out_dir),
            template=prep.template,
            fingerprint=prep.fingerprint,
            given=given_files(given, place.out_dir).get("mask", ""),
            registered_to=given.registered_to,
            unchanged=given.sources.get("to_template") == EARLIER_RUN
            and (given.bias_field is not None or not prep.bias_field),
        ),
        name="write_preprocessed",
        mem_gb=0.3,
    )
    workflow.connect([
        (conform, mask, [("out_file", "in_file")]),
        (mask, scale, [("out_file", "mask_file")]),
        (mask, write, [
            ("out_file", "mask_file"), ("source", "mask_source"), ("doubts", "mask_warnings"),
        ]),
        (conform, write, [("checksum", "checksum")]),
        (conform, outputnode, [
            ("out_file", "conformed_file"), ("notes", "conform_notes"),
            ("checksum", "checksum"), ("seconds", "conform_seconds"),
        ]),
        (mask, outputnode, [
            ("out_file", "mask_file"), ("source", "mask_source"), ("warnings", "mask_warnings"),
            ("stripped", "stripped"), ("seconds", "mask_seconds"),
        ]),
        (scale, outputnode, [
            ("out_file", "scaled_file"), ("scale", "scale"), ("seconds", "scale_seconds"),
        ]),
    ])  # fmt: skip
    corrected = _connect_bias(workflow, prep, given, gigabytes, common)
    _connect_registration(workflow, prep, given, anchor, gigabytes, common, corrected)
    workflow.remove_nodes([workflow.get_node(n) for n in leave_out])
    return workflow


def _connect_bias(
    workflow: Workflow,
    prep: Preprocessing,
    given: Precomputed,
    gigabytes: float,
    common: dict[str, int],
) -> tuple[Node, str]:
    """N4, or the conformed scan as it is; return where the corrected scan comes from."""
    conform, mask, scale, write, outputnode = (
        workflow.get_node(n)
        for n in ("conform", "mask", "scale", "write_preprocessed", "outputnode")
    )
    source = (conform, "out_file")
    if prep.bias_field:
        n4 = Node(N4BiasField(**common), name="n4", n_procs=prep.threads, mem_gb=gigabytes)
        if given.bias_field:
            n4.inputs.given_file = str(given.bias_field)
        workflow.connect([
            (conform, n4, [("out_file", "in_file")]),
            (mask, n4, [("out_file", "mask_file")]),
            (n4, write, [("bias_file", "bias_file")]),
            (n4, outputnode, [("bias_file", "bias_file"), ("seconds", "bias_seconds")]),
        ])  # fmt: skip
        source = (n4, "out_file")
    workflow.connect(*source, scale, "in_file")
    return source


def _connect_registration(
    workflow: Workflow,
    prep: Preprocessing,
    given: Precomputed,
    anchor: Anchor | None,
    gigabytes: float,
    common: dict[str, int],
    corrected: tuple[Node, str],
) -> None:
    """Rigid registration to the template or to the anchor, unless the transform is given."""
    mask, write, outputnode = (
        workflow.get_node(n) for n in ("mask", "write_preprocessed", "outputnode")
    )
    apply = Node(
        ApplyTransform(reference_file=str(prep.template_file), interpolation="linear", **common),
        name="to_template",
        n_procs=prep.threads,
        mem_gb=gigabytes,
    )
    workflow.connect(*corrected, apply, "in_file")
    workflow.connect(apply, "out_file", outputnode, "in_template_file")
    if given.to_template:
        apply.inputs.transforms = [str(given.to_template)]
        outputnode.inputs.transform_file = str(given.to_template)
        outputnode.inputs.registration_warnings = given.transform_doubts
        return
    register = Node(
        _registration(prep, anchor, common),
        name="register",
        n_procs=prep.threads,
        mem_gb=gigabytes + (anchor.gigabytes if anchor else 0),
    )
    workflow.connect(*corrected, register, "moving")
    if anchor is not None:
        _connect_anchor(workflow, prep, anchor, common)
    workflow.connect([
        (mask, register, [("out_file", "moving_mask")]),
        (register, apply, [("out_transform", "transforms")]),
        (register, write, [("out_transform", "transform_file")]),
        (register, outputnode, [
            ("out_transform", "transform_file"), ("seconds", "registration_seconds"),
        ]),
    ])  # fmt: skip


def _registration(
    prep: Preprocessing, anchor: Anchor | None, common: dict[str, int]
) -> CoRegister | RigidRegistration:
    if anchor is None:
        return RigidRegistration(fixed=str(prep.template_file), sloppy=prep.sloppy, **common)
    return CoRegister(
        fixed_mask=str(anchor.mask),
        fixed_transform=str(anchor.to_template),
        fixed_name=anchor.name,
        sloppy=prep.sloppy,
        **common,
    )


def _connect_anchor(
    workflow: Workflow,
    prep: Preprocessing,
    anchor: Anchor,
    common: dict[str, int],
) -> None:
    """The anchor, conformed and bias-corrected as when it was preprocessed itself."""
    register, write, outputnode = (
        workflow.get_node(n) for n in ("register", "write_preprocessed", "outputnode")
    )
    size = anchor.gigabytes
    conform = Node(Conform(in_file=str(anchor.path)), name="conform_anchor", mem_gb=size)
    source = (conform, "out_file")
    if prep.bias_field:
        divide = Node(
            N4BiasField(given_file=str(anchor.bias_field), **common),
            name="n4_anchor",
            mem_gb=size,
        )
        workflow.connect(conform, "out_file", divide, "in_file")
        source = (divide, "out_file")
    workflow.connect(*source, register, "fixed")
    workflow.connect(register, "warnings", write, "registration_warnings")
    workflow.connect(register, "warnings", outputnode, "registration_warnings")
