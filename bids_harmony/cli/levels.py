"""From a checked `Config` to a finished run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from bids_harmony.bids.find import check_dataset
from bids_harmony.bids.scan import MODALITIES, Scan, ScanProblem
from bids_harmony.cli.context import Context
from bids_harmony.cli.fitting import (
    examples_of,
    fit,
    fit_further,
    scans_to_learn_from,
    target_of,
    training_of,
)
from bids_harmony.cli.outputs import Pages, claim_desc, prepare_out_dir, write_logs, write_root
from bids_harmony.cli.progress import Progress, run_line
from bids_harmony.config import DEFAULT_METHOD, Config
from bids_harmony.errors import ExitCode, MissingInputError, UsageError
from bids_harmony.interfaces.tissues import tissue_label
from bids_harmony.methods.base import NATIVE_GRID
from bids_harmony.methods.registry import available
from bids_harmony.methods.registry import load as load_method
from bids_harmony.workflows.adapt import (
    Adapting,
    adapt_to_sites,
    sites_to_adapt_to,
    stored_for,
)
from bids_harmony.workflows.anchors import tell_for_session
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.models import named_bundle
from bids_harmony.workflows.participant import forget_sections, harmonize_scans, split_done
from bids_harmony.workflows.settings import Job, Other, Target
from bids_harmony.workflows.together import find_others, store_others

LOG = logging.getLogger("bids_harmony")


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
    context = Context(config)
    return _train(context) if config.analysis_level == "train" else _participant(context)


def _train(context: Context) -> ExitCode:
    """Fit a method on the reference and write its bundle."""
    config = context.config
    if config.model:
        return _train_further(context, config.model)
    method, reference = config.method or DEFAULT_METHOD, str(config.reference)
    if config.dry_run:
        load_method(method)
        scans = scans_to_learn_from(context, method, reference, config.participant_label)
        how = training_of(context, method)
        words = f" with the preset {how.preset} on {how.device}"
        print(f"would fit {method} on {reference}{words * (available()[method].kind == 'neural')}")
        return _show([_planned(s, "to learn from") for s in scans])
    write_root(config, {})
    write_logs(config, context.uuid, None)
    folder, outcomes = fit(context, method, reference, config.name, config.participant_label)
    print(f"model bundle: {folder}")
    write_logs(config, context.uuid, outcomes)
    return _exit_code(outcomes)


def _train_further(context: Context, model: str) -> ExitCode:
    """Give the networks of a model another reference, or let them learn a new site."""
    config = context.config
    reference = str(config.adapt_to or config.reference)
    networks = named_bundle(config.out_dir, method=config.method, model=model)
    if config.dry_run:
        scans = examples_of(context, networks, reference)
        what = "adapt it to" if config.adapt_to else "take the appearance of"
        print(f"would take the networks of {networks.name} and {what} {reference}")
        return _show([_planned(s, "to learn from") for s in scans])
    write_root(config, {})
    write_logs(config, context.uuid, None)
    folder, outcomes = fit_further(context, networks, reference, config.name)
    print(f"model bundle: {folder}")
    write_logs(config, context.uuid, outcomes)
    return _exit_code(outcomes)


def _participant(context: Context) -> ExitCode:
    """Harmonize the scans that were asked for."""
    config = context.config
    target = target_of(context) if config.level == "full" else None
    modalities = config.modality or (target.contract.modalities if target else MODALITIES)
    if target and (unknown := set(modalities) - set(target.contract.modalities)):
        raise UsageError(
            f"--modality {' '.join(sorted(unknown))}: model {target.name} was fitted on "
            f"{', '.join(target.contract.modalities)} only; train one or choose another"
        )
    scans, problems = context.find(modalities, config.participant_label)
    job = context.job(target.contract.grid if target else NATIVE_GRID)
    if target is not None:
        print(f"model: {target.name} ({target.title}), {target.why}; "
              f"reference domain: {target.reference}")  # fmt: skip
        claim_desc(config.out_dir, config.desc, target, write=not config.dry_run)
        if target.segments:
            label = tissue_label(target.method, config.desc)
            claim_desc(config.out_dir, label, target, write=not config.dry_run)
    if config.dry_run:
        return _plan(context, scans, problems, target, job)
    pages = Pages(config, job.prep, target, scans, problems) if target else None
    if config.reports_only or config.boilerplate_only:
        write_logs(config, context.uuid, [], job.prep, target)
        if pages is not None and config.reports_only:
            for subject in pages.subjects:
                pages.write(subject)
        return ExitCode.OK
    write_root(config, _descriptions(config.desc, target))
    write_logs(config, context.uuid, None, job.prep, target)
    outcomes = _harmonize(context, scans, problems, target, job, pages)
    write_logs(config, context.uuid, outcomes, job.prep, target)
    if pages is not None:
        pages.finish()
        print(f"reports: {config.out_dir / 'sub-*.html'}")
    return _exit_code(outcomes)


def _harmonize(
    context: Context,
    scans: Sequence[Scan],
    problems: Sequence[ScanProblem],
    target: Target | None,
    job: Job,
    pages: Pages | None,
) -> list[Outcome]:
    """Adapt where it is needed, then do every scan; a participant's page follows its last."""
    outcomes = [_refused(p) for p in problems]
    todo = list(scans)
    if target is not None:
        for prepare in (_adapt, _together):
            target, lost = prepare(context, todo, target, job)
            outcomes += lost
            stems = {outcome.stem for outcome in lost}
            forget_sections([scan for scan in todo if scan.stem in stems], job)
            todo = [scan for scan in todo if scan.stem not in stems]
    progress = Progress(len(outcomes) + len(todo))

    def tell(outcome: Outcome) -> None:
        progress(outcome)
        if pages is not None:
            pages(outcome)

    try:
        for outcome in outcomes:
            tell(outcome)
        outcomes += harmonize_scans(todo, target, job, tell)
    finally:
        progress.close()
    print(run_line(outcomes, progress.seconds))
    return outcomes


def _adapt(
    context: Context, scans: Sequence[Scan], target: Target, job: Job
) -> tuple[Target, list[Outcome]]:
    """The target with an adaptation per site that needs one; scans that were lost on the way."""
    keys = sites_to_adapt_to(scans, target)
    if not keys:
        return target, []

    def say(key: tuple[str, str]) -> None:
        print(f"adapting {target.name} to site {key[0]} ({key[1]}) first", flush=True)

    made, failed, crashed = adapt_to_sites(keys, _adapting(context, target, job), say)
    lost = [
        replace(failed[(s.site, s.suffix)], stem=s.stem, subject=s.subject)
        for s in scans
        if (s.site, s.suffix) in failed
    ]
    stems = {outcome.stem for outcome in lost}
    lost += [
        replace(outcome, message=f"its site is adapted to without it: {outcome.message}")
        for outcome in crashed
        if outcome.stem not in stems
    ]
    return replace(target, adaptations=made), lost


def _together(
    context: Context, scans: Sequence[Scan], target: Target, job: Job
) -> tuple[Target, list[Outcome]]:
    """The target with the scans that each is harmonized together with; scans that lack them."""
    others, lost = _others(context, scans, target, job)
    if not others:
        return target, lost

    target = replace(target, others=others)
    _, todo, _ = split_done([scan for scan in scans if scan.stem in others], target, job)
    made, failed = store_others(todo, target, job, tell_for_session)
    return replace(target, others=made), lost + failed


def _others(
    context: Context, scans: Sequence[Scan], target: Target, job: Job
) -> tuple[dict[str, dict[str, Other]], list[Outcome]]:
    """What each scan is harmonized together with, and scans that lack it; nothing is made yet."""
    if not target.contract.together or not scans:
        return {}, []
    people = sorted({scan.subject for scan in scans})
    pool, problems = context.find(target.contract.modalities, people)
    return find_others(scans, pool, problems, target, job)


def _adapting(context: Context, target: Target, job: Job) -> Adapting:
    def find(participants: Sequence[str] | None, modality: str) -> list[Scan]:
        return context.find([modality], participants, plain=True)[0]

    return Adapting(target, job, find, target.adapt_scans)


def _plan(
    context: Context,
    scans: Sequence[Scan],
    problems: Sequence[ScanProblem],
    target: Target | None,
    job: Job,
) -> ExitCode:
    """Say what would be done."""
    lost: list[Outcome] = []
    if target is not None:
        adapting = _adapting(context, target, job)
        keys = sites_to_adapt_to(scans, target)
        stored = {key: found for key in keys if (found := stored_for(key, adapting))}
        for site, modality in [key for key in keys if key not in stored]:
            print(f"would first adapt {target.name} to site {site} ({modality}), "
                  f"on at most {adapting.count} of its scans")  # fmt: skip
        others, lost = _others(context, scans, target, job)
        target = replace(target, adaptations=stored, others=others)
    stems = {outcome.stem for outcome in lost}
    scans = [scan for scan in scans if scan.stem not in stems]
    given, todo, done = split_done(scans, target, job)
    if target is None and context.config.level == "full":  # its model is still to be fitted
        todo, done = list(scans), []
    outcomes = [*(_refused(p) for p in problems), *lost]
    outcomes += [Outcome(s.stem, s.subject, "skipped", "done by an earlier run") for s in done]
    for scan in todo:
        mask = given[scan.stem].sources.get("mask", "to be found")
        text = f"site {scan.site} ({scan.site_source}), brain mask {mask}"
        if scan.anchor and given[scan.stem].registered_to:
            text += f", registered to {scan.anchor.stem}"
        outcomes.append(_planned(scan, text))
    return _show(outcomes)


def _show(outcomes: Sequence[Outcome]) -> ExitCode:
    progress = Progress(len(outcomes))
    for outcome in outcomes:
        progress(outcome)
    progress.close()
    print(run_line(outcomes, progress.seconds))
    return _exit_code(outcomes)


def _planned(scan: Scan, text: str) -> Outcome:
    return Outcome(scan.stem, scan.subject, "planned", text)


def _refused(problem: ScanProblem) -> Outcome:
    return Outcome(problem.stem, problem.subject, "refused", problem.message, ExitCode.DATA)


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
    if target is not None and target.segments:
        label, words = tissue_label(target.method, desc), "tissues that came with it"
        made[label] = f"{made[label]}; {words}" if label in made else f"{made[desc]}: {words}"
    return made
