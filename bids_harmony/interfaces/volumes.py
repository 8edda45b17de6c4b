"""Volumes on a model's grid, kept in the work folder for training and adaptation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nb
import numpy as np

from bids_harmony.bids.write import save_nifti, write_json
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    TimedInterface,
    TimedOutputSpec,
    isdefined,
    traits,
)
from bids_harmony.interfaces.files import load, load_mask
from bids_harmony.interfaces.tissues import labels_of
from bids_harmony.methods.base import Volume
from bids_harmony.methods.lazy_volumes import LazyVolumes
from bids_harmony.methods.sessions import SessionKey, session_key


class StoredVolumes(LazyVolumes):
    """Volumes on disk, each read when it is asked for."""

    def __init__(self, stems: Sequence[Path]) -> None:
        self._stems = list(stems)
        self.facts = [json.loads(Path(f"{s}.json").read_text()) for s in self._stems]

    def __len__(self) -> int:
        return len(self._stems)

    def read(self, index: int) -> Volume:
        """From its files."""
        stem, facts = self._stems[index], self.facts[index]
        data, affine = load(f"{stem}_scaled.nii")
        labels = load(f"{stem}_labels.nii")[0] if facts.get("labelled") else None
        zooms = nb.affines.voxel_sizes(affine)
        return Volume(
            data=data,
            mask=load_mask(f"{stem}_mask.nii"),
            modality=facts["modality"],
            spacing=(float(zooms[0]), float(zooms[1]), float(zooms[2])),
            axes=nb.orientations.aff2axcodes(affine),
            site=facts["site"],
            name=facts["name"],
            subject=facts["subject"],
            session=facts["session"],
            labels=None if labels is None else labels.astype(np.uint8),
        )


class VolumesInSessions(LazyVolumes):
    """Some volumes, each with the others of its session: the first of each other modality.

    Parameters
    ----------
    some, every
        What is given, and where the others are looked for.
    """

    def __init__(self, some: StoredVolumes, every: StoredVolumes) -> None:
        first: dict[SessionKey, dict[str, int]] = {}
        for index, facts in enumerate(every.facts):
            first.setdefault(_session(facts), {}).setdefault(facts["modality"], index)
        self._some, self._every = some, every
        self._others = [
            {m: i for m, i in first.get(_session(f), {}).items() if m != f["modality"]}
            for f in some.facts
        ]

    def __len__(self) -> int:
        return len(self._some)

    def read(self, index: int) -> Volume:
        """With the others of its session."""
        others = {m: self._every[place] for m, place in self._others[index].items()}
        return replace(self._some[index], others=others)


def _session(facts: Mapping[str, str]) -> SessionKey:
    return session_key(facts["site"], facts["subject"], facts["session"], facts["name"])


class _StoreInput(BaseInterfaceInputSpec):
    scaled_file = File(exists=True, mandatory=True, desc="scaled scan on the model's grid")
    mask_file = File(exists=True, mandatory=True, desc="brain mask on the same grid")
    scale = traits.Dict(mandatory=True)
    out_stem = traits.Str(mandatory=True, desc="path without extension")
    key = traits.Dict(mandatory=True, desc="what makes the volume reusable")
    checksum = traits.Str("", usedefault=True)
    facts = traits.Dict(mandatory=True, desc="modality, site, name")
    CSF = File(exists=True, desc="share of each tissue on the model's grid, if wanted")
    GM = File(exists=True)
    WM = File(exists=True)


class StoreVolume(TimedInterface):
    """Keep one volume in the work folder; its JSON comes last and marks the end."""

    _always_run = True
    input_spec = _StoreInput
    output_spec = TimedOutputSpec

    def _run(self, cwd: Path) -> None:
        stem = self.inputs.out_stem
        Path(f"{stem}.json").unlink(missing_ok=True)
        scaled, affine = load(self.inputs.scaled_file)
        mask = load_mask(self.inputs.mask_file)
        save_nifti(np.where(mask, scaled, 0), affine, Path(f"{stem}_scaled.nii"))
        save_nifti(mask, affine, Path(f"{stem}_mask.nii"), dtype=np.uint8)
        labelled = isdefined(self.inputs.CSF)
        if labelled:
            shares = {tissue: load(getattr(self.inputs, tissue))[0] for tissue in TISSUES}
            labels = np.where(mask, labels_of(shares), 0)
            save_nifti(labels, affine, Path(f"{stem}_labels.nii"), dtype=np.uint8)
        facts = {
            **self.inputs.facts,
            "labelled": labelled,
            "key": {**self.inputs.key, "InputSHA256": self.inputs.checksum},
            "scale": dict(self.inputs.scale),
        }
        write_json(Path(f"{stem}.json"), facts)
