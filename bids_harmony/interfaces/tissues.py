"""Tissue labels into training volumes, and tissues of a harmonized scan into derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from bids_harmony.bids.dataset import bids_uri
from bids_harmony.bids.names import derivative_path, sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import atomic_write_text, save_nifti, write_json
from bids_harmony.config import DEFAULT_DESC
from bids_harmony.errors import ScanError
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    isdefined,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask, store

_LONG = {"CSF": "cerebrospinal fluid", "GM": "grey matter", "WM": "white matter"}


def tissue_shares(
    values: Mapping[str, NDArray[Any]], mapping: Mapping[int, str]
) -> dict[str, NDArray[np.float32]]:
    """Share of each tissue in every voxel, 0 to 1.

    Parameters
    ----------
    values
        ``{"dseg": labels}``, or a probability map for each tissue.
    mapping
        Tissue of each label of a dseg.
    """
    if "dseg" not in values:
        return {t: np.clip(values[t], 0, 1).astype(np.float32) for t in TISSUES}
    labels = np.rint(values["dseg"]).astype(np.int64)
    return {
        tissue: np.isin(labels, [k for k, v in mapping.items() if v == tissue]).astype(np.float32)
        for tissue in TISSUES
    }


class _ReadInput(BaseInterfaceInputSpec):
    files = traits.Dict(mandatory=True, desc="dseg, or a probability map for each tissue")
    mapping = traits.Dict(mandatory=True, desc="tissue of each label of a dseg")
    grid_file = File(exists=True, desc="image on whose grid they are wanted; default their own")


class _ReadOutput(TimedOutputSpec):
    CSF = File(desc="share of cerebrospinal fluid, 0 to 1")
    GM = File(desc="share of grey matter")
    WM = File(desc="share of white matter")


class ReadTissueLabels(TimedInterface):
    """A user's tissue labels as one map of shares for each tissue."""

    input_spec = _ReadInput
    output_spec = _ReadOutput

    def _run(self, cwd: Path) -> None:
        grid: Any = None
        values = {}
        for name, path in self.inputs.files.items():
            img: Any = nb.funcs.squeeze_image(nb.loadsave.load(path))
            if len(img.shape) != 3:
                raise ScanError(f"{path}: tissue labels have three axes, not {len(img.shape)}")
            if grid is not None and (
                img.shape != grid.shape or not np.allclose(img.affine, grid.affine, atol=1e-3)
            ):
                raise ScanError(f"{path}: is not on the grid of the scan's other tissue maps")
            grid = img if grid is None else grid
            values[name] = np.asanyarray(img.dataobj, dtype=np.float32)
        for tissue, share in tissue_shares(values, self.inputs.mapping).items():
            data, affine = share, grid.affine
            if isdefined(self.inputs.grid_file):
                wanted, affine = load(self.inputs.grid_file)
                image = nb.nifti1.Nifti1Image(share, grid.affine)
                moved = resample_from_to(image, (wanted.shape, affine), order=1)
                data = np.asanyarray(moved.dataobj, dtype=np.float32)
            self._results[tissue] = store(data, affine, cwd / f"{tissue}.nii")


def labels_of(shares: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """The likeliest of background (what is left) and tissues in each voxel; 0 to 3.

    Parameters
    ----------
    shares
        Of every tissue, (X, Y, Z), 0 to 1.
    """
    maps = np.stack([shares[tissue] for tissue in TISSUES])
    rest = np.clip(1 - maps.sum(axis=0, keepdims=True), 0, 1)
    return np.concatenate((rest, maps)).argmax(axis=0).astype(np.uint8)


class _WriteTissuesInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True)
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    label = traits.Str(mandatory=True, desc="value of the desc entity")
    CSF = File(exists=True, mandatory=True, desc="probability on the raw grid")
    GM = File(exists=True, mandatory=True)
    WM = File(exists=True, mandatory=True)
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the raw grid")
    record = traits.Dict(mandatory=True, desc="what made the harmonized scan")


class _WriteTissuesOutput(TimedOutputSpec):
    out_files = traits.List(traits.Str)
    dseg_file = File(desc="the segmentation among them")
    volumes = traits.Dict(desc="mL of each tissue")


class WriteTissues(TimedInterface):
    """Segmentation of a scan and probability of each tissue, on the raw grid."""

    _always_run = True
    input_spec = _WriteTissuesInput
    output_spec = _WriteTissuesOutput

    def _run(self, cwd: Path) -> None:
        scan: Scan = self.inputs.scan
        out_dir, mask = Path(self.inputs.out_dir), load_mask(self.inputs.mask_file)
        shares, affine = {}, np.eye(4)
        for tissue in TISSUES:
            data, affine = load(getattr(self.inputs, tissue))
            shares[tissue] = np.where(mask, np.clip(data, 0, 1), 0).astype(np.float32)
        record = self.inputs.record
        common = {
            "Sources": [bids_uri(scan.path, Path(self.inputs.bids_dir))],
            "Manual": False,
            "Description": f"Segmentation that came with {record['Method']}",
            "Harmonization": record,
        }
        paths = tissue_paths(out_dir, scan, self.inputs.label)
        for path in paths.values():  # without its sidecar none is taken for a finished one
            sidecar_path(path).unlink(missing_ok=True)
        written = []
        for tissue, path in paths.items():
            if tissue == "dseg":
                save_nifti(labels_of(shares) * mask, affine, path, dtype=np.uint8)
            else:
                save_nifti(shares[tissue], affine, path)
            write_json(sidecar_path(path), common)
            written.append(str(path))
        rows = [f"{number}\t{_LONG[name]}\t{name}" for name, number in TISSUES.items()]
        table = out_dir / f"desc-{self.inputs.label}_dseg.tsv"
        text = "\n".join(["index\tname\tabbreviation", "0\tbackground\tBG", *rows]) + "\n"
        atomic_write_text(table, text)
        voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        self._results["out_files"] = written
        self._results["dseg_file"] = str(paths["dseg"])
        self._results["volumes"] = {
            t: round(float(shares[t].sum(dtype=np.float64)) * voxel, 2) for t in TISSUES
        }


def tissue_label(method: str, desc: str) -> str:
    """Value of the desc entity of tissues: the method's name, or the label that the run was given.

    Two models in one output folder have labels of their own, and so have their tissues.
    """
    named = "".join(letter for letter in method if letter.isalnum())
    return named if desc == DEFAULT_DESC else desc


def tissue_paths(out_dir: Path, scan: Scan, label: str) -> dict[str, Path]:
    """Where the segmentation (``dseg``) and the probability of each tissue go."""
    maps = {
        t: derivative_path(out_dir, scan, desc=label, label=t, suffix="probseg") for t in TISSUES
    }
    return {**maps, "dseg": derivative_path(out_dir, scan, desc=label, suffix="dseg")}
