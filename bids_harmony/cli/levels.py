"""From a checked `Config` to a finished run."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bids_harmony._version import __version__
from bids_harmony.bids.find import check_dataset, find_scans
from bids_harmony.bids.scan import MODALITIES, Scan, ScanProblem
from bids_harmony.cli.files import derivative_folders, read_filters
from bids_harmony.cli.outputs import (
    claim_desc,
    prepare_out_dir,
    write_logs,
    write_pages,
    write_root,
)
from bids_harmony.cli.progress import Progress, run_line
from bids_harmony.config import Config
from bids_harmony.errors import ExitCode, MissingInputError, UsageError
from bids_harmony.imaging.templates import OutputSpace, find_template, parse_space, template_image
from bids_harmony.methods.base import NATIVE_GRID
from bids_harmony.methods.bundle import is_bundle
from bids_harmony.methods.registry import available
from bids_harmony.methods.registry import load as load_method
from bids_harmony.resources import detect, parse_memory, pick_device
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.engine import Engine, read_plugin_file
from bids_harmony.workflows.models import (
    DEFAULT_METHOD,
    bundle_name,
    choose_bundle,
    load_target,
    template_of,
)
from bids_harmony.workflows.participant import harmonize_scans, split_done
from bids_harmony.workflows.settings import Place, Preprocessing, Target
from bids_harmony.workflows.train import fit_reference, one_at_a_time, training_scans

LOG = logging.getLogger("bids_harmony")
_REGISTRATION_MM = 2.0


def run_level(config: Config) -> ExitCode:
    """Run the analysis level that `config` names.

    Raises
    ------
    HarmonyError
        If the run cannot start or go on as a whole.
    """
    if not config.bids_dir.is_dir():
        raise MissingInputError(f"BIDS_DIR {config.bids_dir} does not exist; is it mounted?")
    if config.out_dir.is_dir() and config.out_dir.samefile(config.bids_dir):
        raise UsageError(f"OUT_DIR {config.out_dir} is the raw data set; name another folder")
    if config.skip_bids_validation:
        LOG.warning("--skip-bids-validation: the data set was not checked")
    else:
        for warning in check_dataset(config.bids_dir):
            LOG.warning(warning)
    if not config.dry_run:
        prepare_out_dir(config.out_dir)
    run = _Run(config)
    if config.analysis_level == "train":
        return run.train()
    return run.participant()


class _Run:
    """One run: settings worked out, shared by both levels."""

    def __init__(self, config: Config) -> None:
        self.config = config
        now = datetime.now(UTC)
        self.uuid = f"{now:%Y%m%d-%H%M%S}_{uuid.uuid4()}"
        self.folders = derivative_folders(config.derivatives)
        if config.out_dir in self.folders.values():
            raise UsageError(
                f"--derivatives {config.out_dir} is OUT_DIR, whose own masks are reused anyway "
                "when they were made with the same settings; leave it out"
            )
        self.resources = detect(
            config.nprocs, config.omp_nthreads, parse_memory(config.mem) if config.mem else None
        )
        for reason in self.resources.reasons:
            LOG.info("using %s", reason)
        plugin, plugin_args = (
            read_plugin_file(config.use_plugin) if config.use_plugin else (None, {})
        )
        logs = config.out_dir / "logs"
        self.engine = Engine(
            resources=self.resources,
            work_dir=config.work_dir,
            seed=config.random_seed,
            plugin=plugin,
            plugin_args=plugin_args,
            stop_on_first_crash=config.stop_on_first_crash,
            resource_monitor=logs / f"{self.uuid}_resources.json"
            if config.resource_monitor
            else None,
            write_graph=logs / "graph" if config.write_graph else None,
            verbose=config.verbose,
        )
        self.spaces = tuple(dict.fromkeys(parse_space(s) for s in config.output_spaces))

    def train(self) -> ExitCode:
        """Fit a method on the reference and write its bundle."""
        config = self.config
        method, reference = config.method or DEFAULT_METHOD, str(config.reference)
        if config.dry_run:
            scans = self._training(method, reference, config.participant_label)
            print(f"would fit {method} on {reference}")
            return self._show([_planned(s, "to learn from") for s in scans])
        write_root(config, {})
        write_logs(config, self.uuid, None)
        folder, outcomes = self._fit(method, reference, config.name, config.participant_label)
        print(f"model bundle: {folder}")
        write_logs(config, self.uuid, outcomes)
        return _exit_code(outcomes)

    def _training(self, method: str, reference: str, participants: Sequence[str]) -> list[Scan]:
        """Scans to learn from; what narrows a participant run does not narrow its reference."""
        config = self.config
        modalities: Sequence[str] = available()[method].modalities
        if config.analysis_level == "train":
            scans, problems = self._find(config.modality or modalities, participants)
        else:
            plain = replace(config, session_label=(), bids_filter_file=None)
            scans, problems = self._find(modalities, participants, plain)
        for problem in problems:
            LOG.warning("left out: %s", problem.message)
        return training_scans(scans, reference)

    def _fit(
        self, method: str, reference: str, name: str | None, participants: Sequence[str]
    ) -> tuple[Path, list[Outcome]]:
        config = self.config
        card = available()[method]
        pick_device(config.device, card.devices)
        scans = self._training(method, reference, participants)
        kind = load_method(method)
        contract = kind.contract_for(sorted({s.suffix for s in scans}))
        prep = self._preprocessing(contract.grid)
        place = self._place(prep.template)
        grid = self._template(prep.template, contract.resolution)
        progress = Progress(len(scans))
        try:
            return fit_reference(
                scans,
                method=method,
                name=name or bundle_name(method, reference),
                reference=reference,
                prep=prep,
                place=place,
                grid_file=grid if contract.grid != NATIVE_GRID else None,
                folders=self.folders,
                engine=self.engine,
                clean=self._clean,
                on_outcome=progress,
            )
        finally:
            progress.close()

    def participant(self) -> ExitCode:
        """Harmonize the scans that were asked for."""
        config = self.config
        target = self._target() if config.level == "full" else None
        modalities = config.modality or (target.contract.modalities if target else MODALITIES)
        if target and (unknown := set(modalities) - set(target.contract.modalities)):
            raise UsageError(
                f"--modality {' '.join(sorted(unknown))}: model {target.name} was fitted on "
                f"{', '.join(target.contract.modalities)} only; train one or choose another"
            )
        scans, problems = self._find(modalities, config.participant_label)
        prep = self._preprocessing(target.contract.grid if target else NATIVE_GRID)
        place = self._place(prep.template)
        if target is not None:
            print(f"model: {target.name} ({target.title}), {target.why}; "
                  f"reference domain: {target.reference}")  # fmt: skip
            claim_desc(config.out_dir, config.desc, target, write=not config.dry_run)
        if config.dry_run:
            return self._plan(scans, problems, prep, target, place)
        subjects = sorted({s.subject for s in scans} | {p.subject for p in problems})
        if config.reports_only or config.boilerplate_only:
            write_logs(config, self.uuid, [], prep, target)
            if config.reports_only:
                write_pages(config, subjects, [], prep, target)
            return ExitCode.OK
        write_root(config, _descriptions(config.desc, target))
        write_logs(config, self.uuid, None, prep, target)
        outcomes = self._harmonize(scans, problems, prep, target, place)
        return self._finish(outcomes, subjects, scans, prep, target)

    def _harmonize(
        self,
        scans: Sequence[Scan],
        problems: Sequence[ScanProblem],
        prep: Preprocessing,
        target: Target | None,
        place: Place,
    ) -> list[Outcome]:
        progress = Progress(len(scans) + len(problems))
        outcomes = [_refused(p) for p in problems]
        try:
            for outcome in outcomes:
                progress(outcome)
            outcomes += harmonize_scans(
                scans,
                prep=prep,
                target=target,
                place=place,
                folders=self.folders,
                engine=self.engine,
                clean=self._clean,
                on_outcome=progress,
            )
        finally:
            progress.close()
        print(run_line(outcomes, progress.seconds))
        return outcomes

    def _finish(
        self,
        outcomes: Sequence[Outcome],
        subjects: Sequence[str],
        scans: Sequence[Scan],
        prep: Preprocessing,
        target: Target | None,
    ) -> ExitCode:
        write_logs(self.config, self.uuid, outcomes, prep, target)
        if target is not None:
            write_pages(self.config, subjects, outcomes, prep, target, scans)
            print(f"reports: {self.config.out_dir / 'sub-*.html'}")
        return _exit_code(outcomes)

    def _plan(
        self,
        scans: Sequence[Scan],
        problems: Sequence[ScanProblem],
        prep: Preprocessing,
        target: Target | None,
        place: Place,
    ) -> ExitCode:
        """Say what would be done."""
        given, todo, done = split_done(
            scans, prep=prep, target=target, place=place, folders=self.folders
        )
        if target is None and self.config.level == "full":  # its model is still to be fitted
            todo, done = list(scans), []
        outcomes = [_refused(p) for p in problems]
        outcomes += [Outcome(s.stem, s.subject, "skipped", "done by an earlier run") for s in done]
        for scan in todo:
            mask = given[scan.stem].sources.get("mask", "to be found")
            text = f"site {scan.site} ({scan.site_source}), brain mask {mask}"
            outcomes.append(_planned(scan, text))
        return self._show(outcomes)

    def _show(self, outcomes: Sequence[Outcome]) -> ExitCode:
        progress = Progress(len(outcomes))
        for outcome in outcomes:
            progress(outcome)
        progress.close()
        print(run_line(outcomes, progress.seconds))
        return _exit_code(outcomes)

    @property
    def _clean(self) -> bool:
        kept = self.config.debug or self.config.resource_monitor
        return self.config.clean_workdir and not kept

    def _find(
        self, modalities: Sequence[str], participants: Sequence[str], config: Config | None = None
    ) -> tuple[list[Scan], list[ScanProblem]]:
        config = config or self.config
        return find_scans(
            config.bids_dir,
            participants=list(participants) or None,
            sessions=list(config.session_label) or None,
            modalities=modalities,
            filters=read_filters(config.bids_filter_file),
            site_from=config.site_from,
            database=None if config.dry_run else config.bids_database_dir,
        )

    def _preprocessing(self, grid: str) -> Preprocessing:
        config = self.config
        template = template_of([s.name for s in self.spaces], grid)
        return Preprocessing(
            template=template,
            template_file=self._template(template, _REGISTRATION_MM),
            skull_strip=config.skull_strip,
            bias_field="bias-field" not in config.ignore,
            sloppy=config.sloppy,
            threads=self.resources.omp_nthreads,
            seed=config.random_seed,
        )

    def _place(self, template: str) -> Place:
        wanted = [s for s in self.spaces if s.name != "native"]
        return Place(
            bids_dir=self.config.bids_dir,
            out_dir=self.config.out_dir,
            work_dir=self.config.work_dir,
            desc=self.config.desc,
            spaces=self.spaces,
            space_files={(s.name, s.res): self._space_file(s) for s in wanted},
        )

    def _space_file(self, space: OutputSpace) -> Path:
        return self._template(space.name, space.resolution)

    def _template(self, name: str, resolution: float | None) -> Path:
        """Template image in the work folder, made once (not at all in a dry run)."""
        label = f"{resolution:g}mm" if resolution else "own"
        path = self.config.work_dir / "templates" / f"tpl-{name}_{label}_{__version__}.nii"
        find_template(name)
        if not path.is_file() and not self.config.dry_run:
            from bids_harmony.bids.write import save_nifti

            image = template_image(name, resolution)
            save_nifti(image.get_fdata(dtype="float32"), image.affine, path)
        return path

    def _target(self) -> Target | None:
        """The model of this run; a reference that was never fitted is fitted first.

        None in a dry run that would fit it.
        """
        config = self.config
        if config.reference:
            method = config.method or DEFAULT_METHOD
            name = bundle_name(method, config.reference)
            fitted = is_bundle(config.out_dir / "models" / name)
            if config.dry_run and not fitted:
                scans = self._training(method, config.reference, ())
                print(f"would first fit {method} on {len(scans)} scan(s) of {config.reference}")
                return None
            if not fitted and (config.reports_only or config.boilerplate_only):
                raise UsageError(f"{name} was never fitted; run participant or train first")
            with nullcontext() if fitted else one_at_a_time(config.out_dir / "models"):
                if not is_bundle(config.out_dir / "models" / name):
                    print(f"fitting {method} on {config.reference} first (train level)")
                    self._fit(method, config.reference, name, ())
        folder, why = choose_bundle(
            config.out_dir, method=config.method, model=config.model, reference=config.reference
        )
        target = load_target(folder, why, method=config.method, device=config.device)
        if target.native_grid:
            return target
        grid = self._template(target.contract.grid, target.contract.resolution)
        return replace(target, grid_file=grid)


def _planned(scan: Scan, text: str) -> Outcome:
    return Outcome(scan.stem, scan.subject, "planned", text)


def _refused(problem: ScanProblem) -> Outcome:
    stem = problem.path.name.split(".")[0]
    return Outcome(stem, problem.subject, "refused", problem.message, ExitCode.DATA)


def _exit_code(outcomes: Sequence[Outcome]) -> ExitCode:
    """The one place where outcomes become an exit code: crash, then output, then data."""
    codes = {o.exit_code for o in outcomes} - {ExitCode.OK}
    for code in (ExitCode.FAILURE, ExitCode.CANNOT_CREATE, ExitCode.IO):
        if code in codes:
            return code
    return max(codes, default=ExitCode.OK)


def _descriptions(desc: str, target: Target | None) -> dict[str, str]:
    made = {
        "brain": "brain mask",
        "n4": "bias field found by N4",
    }
    if target is not None:
        made[desc] = f"harmonized with {target.title} (model {target.name}, {target.hash[:12]})"
    return made
