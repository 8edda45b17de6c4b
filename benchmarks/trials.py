"""A method with settings: the models that it needs, and what they make of a table's scans."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.view import FloatArray, View
from bids_harmony.bids.find import find_scans
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import write_json
from bids_harmony.config import ADAPTED
from bids_harmony.errors import MissingInputError, UsageError
from bids_harmony.methods.bundle import is_bundle, load_bundle
from bids_harmony.methods.options import options_for
from bids_harmony.methods.registry import available

if TYPE_CHECKING:
    from benchmarks.harness import Case, Cohort, Prepared, Table

MODALITY = "T1w"
#: Of a model's hash in a file name.
DIGITS = 8


@dataclass(frozen=True)
class Trial:
    """A method with the settings it is tried with; `method` None leaves the scans as they are.

    Attributes
    ----------
    label
        Name in the table, and of the model.
    train, participant
        More options of the command line.
    neural
        Whether device and time limit matter to it.
    sites
        Sites whose training scans it sees; empty for all of the cohort.
    one_example
        Methods by example: the wanted appearance is that of one training scan of the site, not of
        all of them.
    networks_of
        Label of the trial whose networks it takes, instead of a training of its own.
    adapt_to
        Site with whose training scans those networks are trained on.
    conditions
        The only ones it is tried with; empty for all.
    travellers
        Trained on the subjects who were scanned at several sites, instead of the others.
    """

    label: str
    method: str | None
    train: tuple[str, ...] = ()
    participant: tuple[str, ...] = ()
    neural: bool = False
    sites: tuple[str, ...] = ()
    one_example: bool = False
    networks_of: str = ""
    adapt_to: str = ""
    conditions: tuple[str, ...] = ()
    travellers: bool = False

    @property
    def by_example(self) -> bool:
        """Whether one training serves for several references."""
        return self.method is not None and available()[self.method].by_example

    @property
    def of_several_sites(self) -> bool:
        """Whether its training needs the scans of other sites beside the reference's."""
        return self.method is not None and available()[self.method].sites_to_train > 1

    @property
    def options(self) -> dict[str, float]:
        """Values of the method's own options for harmonizing a scan."""
        given = [
            value
            for word, value in itertools.pairwise(self.participant)
            if word == "--method-option"
        ]
        options = available()[self.method].options if self.method else ()
        return options_for(str(self.method), options, "participant", given)

    def cases(self, cohort: Cohort) -> list[Case]:
        """Those that it is tried with."""
        return [c for c in cohort.cases if not self.conditions or c.condition in self.conditions]


def scans_of(bids_dir: Path, participants: Sequence[str]) -> list[Scan]:
    """T1w scans of participants.

    Raises
    ------
    UsageError
        If one of their scans cannot be used.
    """
    scans, problems = find_scans(
        bids_dir,
        participants=list(participants),
        sessions=None,
        modalities=(MODALITY,),
        filters={},
        site_from=None,
    )
    if problems:
        raise UsageError(problems[0].message)
    return scans


def example_of(cohort: Cohort, site: str) -> Scan:
    """The one training scan of a site that shows its appearance: the first participant's.

    Raises
    ------
    MissingInputError
        If the cohort has none there.
    """
    found = [s for s in scans_of(cohort.bids_dir, cohort.training) if s.site == site]
    if not found:
        raise MissingInputError(f"the cohort has no training scan of {site}")
    return min(found, key=lambda scan: scan.subject)


def model_for(table: Table, trial: Trial, to: str, prep: Prepared) -> Path:
    """Bundle that leads a trial's scans to a reference; made unless it exists.

    Raises
    ------
    MissingInputError
        If another table, or another trial, should have made it.
    """
    if not trial.by_example:
        label = trial.networks_of or trial.label
        folder = prep.model(_name(label, to, prep.cohort.reference))
        if not _made(trial, folder):
            scans = training_scans(trial, prep.cohort, only="" if trial.of_several_sites else to)
            _train(table, trial, folder, prep, to, scans)
        return folder
    home = _home(trial, prep.cohort)
    networks = prep.model(trial.networks_of or trial.label)
    if not _made(trial, networks):
        _train(table, trial, networks, prep, home, training_scans(trial, prep.cohort))
    if to != home or trial.one_example:
        networks = _towards(table, trial, networks, to, prep)
    return _adapted(table, trial, networks, to, prep) if trial.adapt_to else networks


def _made(trial: Trial, networks: Path) -> bool:
    """Whether they are there; MissingInputError if another trial should have made them."""
    there = is_bundle(networks)
    if trial.networks_of and not there:
        raise MissingInputError(f"{networks} does not exist; try {trial.networks_of} first")
    return there


def _home(trial: Trial, cohort: Cohort) -> str:
    """The reference that a method by example is trained with."""
    seen = not trial.sites or cohort.reference in trial.sites
    return cohort.reference if seen else trial.sites[0]


def _name(label: str, to: str, home: str) -> str:
    return label if to == home else f"{label}-to-{to}"


def _towards(table: Table, trial: Trial, networks: Path, to: str, prep: Prepared) -> Path:
    """The networks with another reference, shown by training scans of the cohort alone."""
    suffix = "-by-one" if trial.one_example else ""
    folder = prep.model(f"{networks.name}-to-{to}{suffix}")
    if not is_bundle(folder):
        shown, wanted = to, training_scans(trial, prep.cohort, only=to, anywhere=True)
        if trial.one_example:
            example = example_of(prep.cohort, to)
            shown, wanted = example.subject, [example]
        prep.run(
            "train", "--model", str(networks), "--reference", shown, "--name", folder.name,
            *only_these(wanted), *_device(trial, prep), *table.arguments(prep.cohort),
        )  # fmt: skip
    return folder


def _adapted(table: Table, trial: Trial, networks: Path, to: str, prep: Prepared) -> Path:
    """The networks, trained on with the training scans of a new site."""
    folder = prep.model(f"{trial.label}-to-{to}")
    if not is_bundle(folder):
        scans = training_scans(trial, prep.cohort, only=trial.adapt_to, anywhere=True)
        print(f"{table.name}: training {trial.label} on", flush=True)
        modalities = trial.train[trial.train.index("--modality") :]
        wall, cpu = prep.run(
            "train", "--model", str(networks), "--adapt-to", trial.adapt_to,
            "--name", folder.name, *only_these(scans), *modalities,
            *_device(trial, prep), *table.arguments(prep.cohort), *_limit(trial, prep),
        )  # fmt: skip
        note(prep.folder, trial.label, train_seconds=wall, train_cpu_seconds=cpu)
    return folder


def training_scans(
    trial: Trial, cohort: Cohort, *, only: str = "", anywhere: bool = False
) -> list[Scan]:
    """Scans to learn from: of the trial's sites (or, with `anywhere`, of all), or of one.

    Raises
    ------
    MissingInputError
        If there is none.
    """
    people = cohort.travellers if trial.travellers else cohort.training
    found = [
        scan
        for scan in scans_of(cohort.bids_dir, people)
        if (anywhere or not trial.sites or scan.site in trial.sites)
        and (not only or scan.site == only)
    ]
    if not found:
        raise MissingInputError(f"{trial.label}: the cohort has no training scan of {only}")
    return found


def only_these(scans: Sequence[Scan]) -> list[str]:
    """Options of the command line that name the participants and, if all have one, sessions.

    Named sessions leave out the scans that have none.
    """
    labels = sorted({scan.subject for scan in scans})
    sessions = sorted({scan.session or "" for scan in scans})
    named = () if "" in sessions else ("--session-label", *sessions)
    return ["--participant-label", *labels, *named]


def _train(
    table: Table,
    trial: Trial,
    folder: Path,
    prep: Prepared,
    reference: str,
    scans: Sequence[Scan],
) -> None:
    print(f"{table.name}: training {folder.name}", flush=True)
    wall, cpu = prep.run(
        "train", "--method", str(trial.method), "--reference", reference,
        "--name", folder.name, *only_these(scans),
        *_device(trial, prep), *table.arguments(prep.cohort), *trial.train, *_limit(trial, prep),
    )  # fmt: skip
    note(prep.folder, trial.label, train_seconds=wall, train_cpu_seconds=cpu)


def harmonized(
    table: Table, trial: Trial, bundle: Path, cases: Sequence[Case], prep: Prepared
) -> View:
    """Harmonize the scans of cases that all go to one reference; how to read a result."""
    loaded = load_bundle(bundle)
    desc = f"{letters(trial.label)}{loaded.hash[:DIGITS]}"
    scans = {s.stem: s for case in cases for s in case.scans}
    paths = {k: derivative_path(prep.out_dir, s, desc=desc) for k, s in scans.items()}
    missing = [k for k, path in paths.items() if not path.is_file()]
    if missing:
        print(f"{table.name}: harmonizing {len(missing)} scans with {bundle.name}", flush=True)
        wall, cpu = prep.run(
            "participant", "--model", str(bundle), "--desc", desc,
            "--output-spaces", "native",
            *only_these([scans[k] for k in missing]),
            *_device(trial, prep), *table.arguments(prep.cohort), *trial.participant,
        )  # fmt: skip
        count = len(missing)
        note(prep.folder, trial.label, seconds=wall / count, cpu_seconds=cpu / count)
    scale = loaded.output_scale[MODALITY]

    def image(scan: Scan) -> FloatArray:
        return scale.apply(prep.read(paths[scan.stem]))

    def dseg(scan: Scan) -> FloatArray:
        return prep.read(derivative_path(prep.out_dir, scan, desc=desc, suffix="dseg"))

    return View(image, dseg, bundle, trial.options)


def forget_models(models: Path, labels: Iterable[str]) -> None:
    """Remove the models and adaptations of trials."""
    for label in labels:
        own = (models / label, *models.glob(f"{label}-to-*"))
        for made in (*own, *models.glob(f"{ADAPTED}/{label}-*")):
            shutil.rmtree(made, ignore_errors=True)


def letters(label: str) -> str:
    """A label as it may stand in a file name's entity."""
    return re.sub(r"[^A-Za-z0-9]", "", label)


def timings(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by label, as far as they were noted."""
    path = folder / "timings.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def note(folder: Path, label: str, **seconds: float) -> None:
    """Keep seconds of a label."""
    known = timings(folder)
    known.setdefault(label, {}).update({k: round(v, 2) for k, v in seconds.items()})
    write_json(folder / "timings.json", known)


def _limit(trial: Trial, prep: Prepared) -> tuple[str, ...]:
    limit = prep.settings.minutes if trial.neural else None
    return ("--max-time", str(limit)) if limit else ()


def _device(trial: Trial, prep: Prepared) -> tuple[str, ...]:
    return ("--device", prep.settings.device) if trial.neural else ()
