"""Write simulated subjects as a raw BIDS data set, with the truth as a derivative data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bids_harmony.bids.scan import MODALITIES
from bids_harmony.errors import OutputError, UsageError
from bids_harmony.phantom.acquisition import Scan, acquire
from bids_harmony.phantom.anatomy import build_anatomy
from bids_harmony.phantom.person import Person, make_person
from bids_harmony.phantom.signal import TISSUES
from bids_harmony.phantom.sites import ADULTS, REFERENCE, Site, get_sites
from bids_harmony.phantom.writing import image_bytes, write_json, write_new, write_tsv

LOGGER = logging.getLogger("bids_harmony.phantom")
#: Where the truth goes, below the data set root.
TRUTH = Path("derivatives") / "phantom"
#: BIDS entity that tells the scans of one session apart.
ACQUISITION = {"T1w": "", "T2w": "_acq-tse", "FLAIR": "_acq-tirtse"}
_LABELS = ((0, "background", "BG"), (1, "CSF", "CSF"), (2, "grey matter", "GM"),
           (3, "white matter", "WM"), (4, "white matter hyperintensity", "L"))  # fmt: skip


def sites_of(index: int, sites: Sequence[Site], travelling: int | None) -> list[Site]:
    """Sites that scan a subject.

    Parameters
    ----------
    index
        Number of the subject, from 1.
    sites
        All sites of the data set.
    travelling
        Subjects with a number up to this one are scanned everywhere, the others at one site
        each, in turn; None for everyone everywhere.
    """
    if travelling is None or index <= travelling:
        return list(sites)
    return [sites[(index - 1) % len(sites)]]


def write_phantom(
    bids_dir: Path,
    *,
    subjects: int = 6,
    sites: Sequence[str] = ADULTS,
    modalities: Sequence[str] = ("T1w",),
    travelling: int | None = None,
    resolution: float | None = None,
    lesions: bool | float = False,
    seed: int = 0,
    workers: int = 1,
    first: int = 1,
    truths: Sequence[str] = (REFERENCE,),
) -> Path:
    """Simulate travelling subjects and write them as BIDS.

    Parameters
    ----------
    bids_dir
        New or empty folder.
    subjects
        How many.
    sites
        Names from ``all_sites()``, one session each; ``mprage3`` is the reference domain.
    modalities
        Any of ``T1w``, ``T2w``, ``FLAIR``.
    travelling
        How many of the subjects are scanned at every site; None for all of them.
    resolution
        Smallest voxel edge of every scan, mm; None for the sites' own protocols.
    lesions
        True: every subject has white-matter hyperintensities; a number: this share of them has.
    seed
        The same seed gives the same files; subject k does not depend on how many there are.
    workers
        Processes.
    first
        Number of the first subject.
    truths
        Sites in whose contrast the truth of every scan is written, beside that of its own.

    Returns
    -------
    ``bids_dir``. The truth is in ``derivatives/phantom`` below it.

    Raises
    ------
    UsageError
        Impossible arguments, or the folder is not empty.
    OutputError
        The folder cannot be written.
    """
    chosen, wanted = get_sites(tuple(sites)), get_sites(tuple(truths))
    _check(subjects, modalities, travelling, resolution, float(lesions), workers, first)
    _prepare(bids_dir)
    indices = range(first, first + subjects)
    people = [make_person(seed, k, lesions=float(lesions)) for k in indices]
    _write_descriptions(bids_dir, people)
    jobs = [
        (
            bids_dir,
            person,
            sites_of(person.index, chosen, travelling),
            tuple(modalities),
            resolution,
            wanted,
        )
        for person in people
    ]
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            write_subject(*job)
        return bids_dir
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(write_subject, *job) for job in jobs]:
            future.result()
    return bids_dir


def _check(
    subjects: int,
    modalities: Sequence[str],
    travelling: int | None,
    resolution: float | None,
    lesions: float,
    workers: int,
    first: int,
) -> None:
    if subjects < 1 or first < 1 or workers < 1:
        raise UsageError("subjects, the first subject and workers must be at least 1")
    if travelling is not None and not 0 <= travelling <= subjects:
        raise UsageError(f"travelling must be between 0 and the number of subjects ({subjects})")
    if resolution is not None and not 0.8 <= resolution <= 8:
        raise UsageError(f"resolution {resolution} mm: choose between 0.8 and 8")
    if not 0 <= lesions <= 1:
        raise UsageError(f"lesions {lesions}: give a share of the subjects between 0 and 1")
    if not modalities or len(set(modalities)) != len(modalities):
        raise UsageError("name each modality once: " + ", ".join(MODALITIES))
    for modality in modalities:
        if modality not in MODALITIES:
            raise UsageError(f"unknown modality {modality!r}: choose from {', '.join(MODALITIES)}")


def _prepare(bids_dir: Path) -> None:
    """Create the folder; refuse one that holds anything."""
    if bids_dir.is_dir() and any(bids_dir.iterdir()):
        raise UsageError(f"{bids_dir} is not empty: name a new folder")
    if bids_dir.exists() and not bids_dir.is_dir():
        raise UsageError(f"{bids_dir} is a file: name a new folder")
    try:
        bids_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {bids_dir}: {error.strerror}") from error


def _write_descriptions(bids_dir: Path, people: Sequence[Person]) -> None:
    """Files at the top of both data sets."""
    from bids_harmony import __version__

    generated = {"Name": "bids_harmony-phantom", "Version": __version__}
    common = {"BIDSVersion": "1.10.0", "License": "CC0", "GeneratedBy": [generated]}
    write_json(
        bids_dir / "dataset_description.json",
        {"Name": "Simulated travelling subjects", "DatasetType": "raw", **common},
    )
    readme = (
        "Simulated brain MRI of people who do not exist, scanned at invented sites.\n\n"
        "Each site is a session (column site of the *_sessions.tsv files). The truth (tissue,\n"
        "brain mask, bias field, images without noise) is in derivatives/phantom.\n"
    )
    write_new(bids_dir / "README", readme.encode())
    rows = [(f"sub-{p.label}", p.age, p.sex) for p in people]
    write_tsv(bids_dir / "participants.tsv", ("participant_id", "age", "sex"), rows)
    write_json(
        bids_dir / "participants.json",
        {
            "age": {"Description": "Age", "Units": "year"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
        },
    )
    truth = bids_dir / TRUTH
    write_json(
        truth / "dataset_description.json",
        {
            "Name": "Truth of the simulated travelling subjects",
            "DatasetType": "derivative",
            **common,
            "GeneratedBy": [{**generated, "Name": "phantom"}],
            "DatasetLinks": {"raw": "../.."},
        },
    )
    write_new(truth / "README", b"Truth of the simulated scans, on the grid of each scan.\n")
    write_tsv(truth / "dseg.tsv", ("index", "name", "abbreviation"), _LABELS)
    columns = ("age", "icv", "gm", "wm", "csf", "ventricles", "lesions")
    volumes = [
        (f"sub-{p.label}", *(round(float(getattr(p, c)), 5) for c in columns)) for p in people
    ]
    write_tsv(truth / "participants.tsv", ("participant_id", *columns), volumes)
    write_json(truth / "participants.json", _VOLUME_COLUMNS)


_VOLUME_COLUMNS = {
    "age": {"Description": "Age", "Units": "year"},
    "icv": {"Description": "Volume of the brain mask", "Units": "mL"},
    "gm": {"Description": "Grey matter as a share of icv"},
    "wm": {"Description": "White matter with its hyperintensities as a share of icv"},
    "csf": {"Description": "Cerebrospinal fluid inside the brain mask as a share of icv"},
    "ventricles": {"Description": "Lateral and third ventricles as a share of icv"},
    "lesions": {"Description": "White-matter hyperintensities", "Units": "mL"},
}


def write_subject(
    bids_dir: Path,
    person: Person,
    sites: Sequence[Site],
    modalities: Sequence[str],
    resolution: float | None,
    truths: Sequence[Site],
) -> None:
    """Simulate one subject at the given sites and write every file of it."""
    spacing = 2.0 if resolution is not None and resolution >= 2 else 1.0
    anatomy = build_anatomy(person, spacing)
    subject = f"sub-{person.label}"
    write_tsv(
        bids_dir / subject / f"{subject}_sessions.tsv",
        ("session_id", "site"),
        [(f"ses-{site.name}", site.name) for site in sites],
    )
    for site in sites:
        own = {k: v * site.t1_scale.get(k, 1.0) for k, v in person.t1_scale.items()}
        scanned = replace(person, t1_scale=own)
        for modality in modalities:
            LOGGER.info("%s: %s at %s", subject, modality, site.name)
            contrasts = {other.name: other for other in (*truths, site)}
            scan = acquire(anatomy, scanned, site, modality, contrasts, resolution)
            _write_scan(bids_dir, person, site, modality, scan)
            _write_truth(bids_dir, person, site, modality, scan)


def _names(person: Person, site: Site, modality: str) -> tuple[Path, str]:
    """Folder below the root, and the file name without suffix."""
    folder = Path(f"sub-{person.label}") / f"ses-{site.name}" / "anat"
    return folder, f"sub-{person.label}_ses-{site.name}{ACQUISITION[modality]}"


def _write_scan(bids_dir: Path, person: Person, site: Site, modality: str, scan: Scan) -> None:
    folder, stem = _names(person, site, modality)
    protocol = site.protocols[modality]
    path = bids_dir / folder / f"{stem}_{modality}.nii.gz"
    write_new(path, image_bytes(scan.image, scan.affine, slope=scan.slope))
    write_json(
        bids_dir / folder / f"{stem}_{modality}.json", {**site.metadata(), **protocol.metadata()}
    )


def _write_truth(bids_dir: Path, person: Person, site: Site, modality: str, scan: Scan) -> None:
    """Tissue fractions, labels, brain mask, bias field and ideal images on the scan's grid."""
    folder, stem = _names(person, site, modality)
    target = bids_dir / TRUTH / folder
    raw = f"bids:raw:{(folder / f'{stem}_{modality}.nii.gz').as_posix()}"
    inside = scan.brain >= 0.5

    def put(name: str, data: Any, **fields: Any) -> None:
        write_new(target / f"{stem}_{name}.nii.gz", image_bytes(data, scan.affine))
        write_json(target / f"{stem}_{name}.json", {"Sources": [raw], **fields})

    brain = {name: scan.fractions[TISSUES.index(name)] for name in ("CSF", "GM", "WM", "lesion")}
    labels = {"CSF": "CSF", "GM": "GM", "WM": "WM"}
    if person.lesions > 0:
        labels["lesion"] = "L"
    for name, label in labels.items():
        put(f"label-{label}_probseg", np.where(inside, brain[name], 0).astype(np.float32))
    winner = np.argmax(np.stack(list(brain.values())), axis=0) + 1
    put("dseg", np.where(inside, winner, 0).astype(np.uint8), Manual=False)
    if person.lesions > 0:
        put("label-L_mask", (inside & (winner == 4)).astype(np.uint8), Type="Lesion")
    put("desc-brain_mask", inside.astype(np.uint8), Type="Brain")
    put(
        f"desc-bias_{modality}",
        scan.bias,
        SkullStripped=False,
        Description="Receive bias field that multiplies the image",
    )
    for name, image in scan.truth.items():
        put(
            f"desc-truth{name}_{modality}",
            image,
            SkullStripped=False,
            Description=f"Contrast of site {name} without bias field, transmit error and noise",
        )
