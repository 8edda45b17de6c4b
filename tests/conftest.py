"""A small data set of skull-stripped brains: no head needs to be registered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter

os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Brightness, contrast (gamma) and shading of each site.
SITES = {"A": (900.0, 1.0, 0.05), "B": (400.0, 0.6, 0.15)}
SPACE = "MNI152NLin2009aSym"
IDENTITY = """#Insight Transform File V1.0
#Transform 0
Transform: AffineTransform_double_3_3
Parameters: 1 0 0 0 1 0 0 0 1 0 0 0
FixedParameters: 0 0 0
"""


@pytest.fixture(autouse=True)
def fresh_logging():
    """The command line takes the log over; the next test gets it back as it was."""
    log = logging.getLogger("bids_harmony")
    kept = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = kept


class Brains:
    """Makes brains from a template: others in form, contrast, noise and shading, not in place."""

    def __init__(self, resolution: float = 4.0):
        from bids_harmony.imaging.templates import template_image

        image = template_image("MNI152NLin2009aSym", resolution)
        data = image.get_fdata(dtype=np.float32)
        self.data = np.where(data > 0.25, data, 0).astype(np.float32)
        self.affine = image.affine

    def brain(self, site: str, seed: int, *, move: bool = True):
        """One scan: shape as the template's grid, zero outside the brain, and its affine."""
        rng = np.random.default_rng(seed)
        bright, gamma, shade = SITES[site]
        scale = 1 + 0.03 * rng.standard_normal(3)
        centre = (np.array(self.data.shape) - 1) / 2
        shape = affine_transform(
            self.data, np.diag(scale), offset=centre - scale * centre, order=1
        )
        mask = shape > 0.25
        field = gaussian_filter(rng.standard_normal(self.data.shape), 12)
        values = bright * shape**gamma * np.exp(shade * field / field.std())
        values += 0.02 * bright * rng.standard_normal(values.shape)
        affine = self.affine.copy()
        if move:
            affine[:3, 3] += rng.uniform(-6, 6, 3)
        return np.where(mask, np.maximum(values, 1), 0).astype(np.float32), affine


class DataSet:
    """A BIDS data set being written."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.json("dataset_description.json", {"Name": "tiny", "BIDSVersion": "1.10.0"})
        (root / "README").write_text("A tiny data set of simulated brains, for tests only.\n" * 4)
        self._rows: list[tuple[str, str]] = []

    def json(self, name: str, content) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    def path(self, sub: str, suffix: str = "T1w", ses: str | None = None, ext: str = ".nii.gz"):
        parts = [f"sub-{sub}", *([f"ses-{ses}"] if ses else [])]
        path = self.root.joinpath(*parts, "anat", "_".join([*parts, suffix]) + ext)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def scan(self, sub: str, data, affine, *, sidecar=True, **where) -> Path:
        """Write one scan with its sidecar."""
        path = self.path(sub, **where)
        image = data if isinstance(data, nb.Nifti1Image) else nb.Nifti1Image(data, affine)
        if not isinstance(data, nb.Nifti1Image):
            image.set_sform(affine, 1)
            image.set_qform(affine, 1)
            image.header.set_xyzt_units("mm")
        image.to_filename(path)
        if sidecar:
            self.json(
                str(path.relative_to(self.root)).split(".")[0] + ".json",
                {"Manufacturer": "None", "MagneticFieldStrength": 3, "RepetitionTime": 2.3},
            )
        return path

    def site(self, sub: str, site: str) -> None:
        self._rows.append((sub, site))
        lines = ["participant_id\tsite", *(f"sub-{s}\t{x}" for s, x in sorted(set(self._rows)))]
        (self.root / "participants.tsv").write_text("\n".join(lines) + "\n")

    def snapshot(self) -> dict[str, tuple[str, int]]:
        """Checksum and time of change of every file."""
        return snapshot(self.root)


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Checksum and time of change of every file below a folder."""
    return {
        str(p.relative_to(root)): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns,
        )
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


class Ran:
    """What one call of the command left behind."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def line(self, stem: str) -> str:
        """The line that tells the outcome of a scan."""
        found = [text for text in self.out.splitlines() if f" {stem}: " in text]
        assert len(found) == 1, f"{stem}: {len(found)} lines\n{self.out}\n{self.err}"
        return found[0]


def call(*argv) -> Ran:
    """Run the command in this process."""
    import contextlib
    import io

    from bids_harmony.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as leave:
            code = leave.code
    return Ran(int(code or 0), out.getvalue(), err.getvalue())


def serial(work: Path) -> list[str]:
    """Options of a run that starts no workers."""
    return ["-w", str(work), "--nprocs", "1", "--sloppy"]


def quick(work: Path, transforms: Path) -> list[str]:
    """Options of a run without the two slow steps: N4 is left out, the transform is given."""
    return [*serial(work), "--ignore", "bias-field", "--derivatives", f"theirs={transforms}"]


def give_transform(root: Path, raw: Path) -> None:
    """Write, as another pipeline would, an identity transform of a scan to the template."""
    stem, _, modality = raw.name.split(".")[0].rpartition("_")
    for folder in [p for p in raw.parents if p.name.startswith(("sub-", "ses-"))][:1]:
        above = [p.name for p in (folder.parent, folder) if p.name.startswith(("sub-", "ses-"))]
        path = root.joinpath(
            *above, "anat", f"{stem}_from-{modality}_to-{SPACE}_mode-image_xfm.txt"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(IDENTITY)


@pytest.fixture(scope="session")
def brains() -> Brains:
    return Brains()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, brains) -> DataSet:
    """Four participants of two sites; nothing may write to it."""
    made = DataSet(tmp_path_factory.mktemp("tiny") / "raw")
    for number, site in enumerate(("A", "A", "B", "B"), start=1):
        made.scan(f"0{number}", *brains.brain(site, number))
        made.site(f"0{number}", site)
    return made


@pytest.fixture(scope="session")
def transforms(tmp_path_factory, tiny) -> Path:
    """Transforms of the tiny data set to the template, as of another pipeline."""
    root = tmp_path_factory.mktemp("theirs")
    for path in tiny.root.rglob("*_T1w.nii.gz"):
        give_transform(root, path)
    return root


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, tiny, transforms) -> Path:
    """Nyul bundle fitted on the two scans of site A."""
    folder = tmp_path_factory.mktemp("bundle")
    options = quick(folder / "work", transforms)
    ran = call(tiny.root, folder / "out", "train", "--reference", "A", *options)
    assert ran.code == 0, ran.out + ran.err
    return folder / "out" / "models" / "nyul-A"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests on one worker: its session fixtures are whole runs of the command."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
