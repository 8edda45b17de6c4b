"""argv -> Config. Imports nothing heavy: `--help` and `--version` stay fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bids_harmony._version import __version__
from bids_harmony.bids.scan import MODALITIES
from bids_harmony.cli.checks import checked
from bids_harmony.config import (
    ADAPT_SCANS,
    DEFAULT_DESC,
    DEFAULT_SEED,
    Config,
    read_config_file,
)
from bids_harmony.errors import ExitCode, UsageError
from bids_harmony.methods.registry import available

LEVELS = ("train", "participant")
STEPS_TO_IGNORE = ("bias-field",)
PRESETS = ("cpu", "paper")
ADAPT = ("site", "scan", "none")
_EPILOG = """\
examples:
  bids_harmony BIDS OUT participant
  bids_harmony BIDS OUT train --method nyul --reference SITE
  bids_harmony BIDS OUT participant --participant-label 01 02 --method nyul --reference SITE
"""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves with the exit code of the BIDS Apps execution specification."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(ExitCode.USAGE), f"{self.prog}: error: {message}\n")


class _PrintDescriptor(argparse.Action):
    """Print the Boutiques descriptor and leave, whatever else stands on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from bids_harmony.cli.boutiques import descriptor_json

        print(descriptor_json(parser))
        parser.exit(int(ExitCode.OK))


def build_parser() -> argparse.ArgumentParser:
    """The command line; options that were not given are absent from the namespace."""
    parser = _Parser(
        prog="bids_harmony",
        description="Harmonize the T1w, T2w and FLAIR scans of a BIDS data set across scanners.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("bids_dir", type=Path, help="raw BIDS data set; it is only read")
    parser.add_argument("out_dir", type=Path, help="derivatives data set to write")
    parser.add_argument(
        "analysis_level",
        metavar="{" + ",".join(LEVELS) + "}",
        help="train: fit a method on a reference site; participant: harmonize scans",
    )
    parser.add_argument("--version", action="version", version=f"bids_harmony {__version__}")
    parser.add_argument(
        "--bids-exec-spec",
        "--bids_exec_spec",
        action=_PrintDescriptor,
        nargs=0,
        help="print the Boutiques descriptor of this command and leave",
    )
    for add in (_add_selection, _add_harmonization, _add_resources, _add_modes, _add_others):
        add(parser)
    return parser


def _option(group: Any, name: str, *more: str, **settings: Any) -> None:
    """Add an option in its ``-`` and ``_`` spelling."""
    spellings = [name, *more]
    spellings += [
        s
        for s in ("--" + n[2:].replace("-", "_") for n in spellings if n[:2] == "--")
        if s not in spellings
    ]
    group.add_argument(*spellings, dest=name[2:].replace("-", "_"), **settings)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which scans")
    _option(
        group,
        "--participant-label",
        nargs="+",
        metavar="LABEL",
        help="participants, with or without sub-; or a text file with one per line",
    )
    _option(
        group,
        "--session-label",
        "--session-id",
        nargs="+",
        metavar="LABEL",
        help="sessions, with or without ses-",
    )
    _option(
        group,
        "--modality",
        nargs="+",
        choices=MODALITIES,
        help="modalities (default: those the model can harmonize)",
    )
    _option(
        group,
        "--bids-filter-file",
        type=Path,
        metavar="FILE",
        help='JSON with PyBIDS filters per modality; null: entity absent, "*": present',
    )
    _option(
        group,
        "--bids-database-dir",
        type=Path,
        metavar="DIR",
        help="PyBIDS database to reuse or create (never needed for speed)",
    )
    _option(
        group,
        "--skip-bids-validation",
        action="store_true",
        help="do not check dataset_description.json",
    )
    _option(
        group,
        "--derivatives",
        "-d",
        nargs="+",
        metavar="[NAME=]DIR",
        help="derivatives (fMRIPrep, sMRIPrep, SynthStrip) whose brain masks and "
        "transforms replace our own",
    )
    _option(
        group,
        "--site-from",
        metavar="COLUMN|sidecar:KEY|FILE",
        help="where the site of a scan stands (default: scans.tsv, sessions.tsv, "
        "participants.tsv, sidecar)",
    )


def _add_harmonization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("harmonization")
    _option(group, "--method", choices=sorted(available()), help="harmonization method")
    _option(
        group,
        "--model",
        metavar="NAME|DIR",
        help="model bundle: a name below OUT/models or shipped with the package, or a folder; "
        "with --reference (methods by example) its networks, for another appearance",
    )
    _option(
        group,
        "--reference",
        metavar="SITE|LABEL|FILE|THETA",
        help="site of this data set (or one participant or scan) whose appearance is wanted; "
        "calamiti also takes numbers, such as T1w=0.3,-1.2/T2w=0.1,0.4",
    )
    _option(group, "--name", help="train: name of the model bundle (default METHOD-REFERENCE)")
    presets = dict.fromkeys(PRESETS)
    presets |= {preset: None for card in available().values() for preset in card.presets}
    _option(
        group,
        "--preset",
        choices=tuple(presets),
        help="train, neural methods: size of network and training (default: the method's first)",
    )
    _option(
        group,
        "--max-time",
        type=_positive,
        metavar="MINUTES",
        help="train, neural methods: stop the training after this time and keep the best state",
    )
    _option(
        group,
        "--method-option",
        nargs="+",
        metavar="NAME=VALUE",
        help="numbers that a method has of its own (docs: Methods), such as consistency=0",
    )
    _option(
        group,
        "--adapt-to",
        metavar="SITE",
        help="train, with --model: train its networks on with the scans of a new site, where the "
        "method can (calamiti); its reference stays",
    )
    _option(
        group,
        "--adapt",
        choices=ADAPT,
        help="participant, methods that adapt: to each site that training has not seen (default), "
        "to each scan alone, or not at all",
    )
    _option(
        group,
        "--adapt-scans",
        type=_positive,
        metavar="N",
        help=f"scans of a site that are adapted to ({ADAPT_SCANS})",
    )
    _option(
        group,
        "--adapt-segmentation",
        type=Path,
        metavar="FILE",
        help="participant, harmonizing-flows: your segmentation network (TorchScript); what makes "
        "it less sure of the harmonized slices is not kept",
    )
    _option(group, "--desc", metavar="LABEL", help=f"desc- label of outputs ({DEFAULT_DESC})")
    _option(
        group,
        "--skull-strip",
        choices=("auto", "skip", "force"),
        help="auto: recognise stripped scans; skip: all are stripped; force: none is",
    )
    _option(
        group,
        "--output-spaces",
        nargs="+",
        metavar="SPACE[:res-N]",
        help="native (default) and/or templates such as MNI152NLin2009aSym:res-2",
    )
    _option(group, "--ignore", nargs="+", choices=STEPS_TO_IGNORE, help="steps to leave out")
    _option(
        group,
        "--level",
        choices=("minimal", "full"),
        help="minimal: brain mask, bias field and transform only; full: harmonize (default)",
    )
    _option(group, "--random-seed", type=int, metavar="N", help=f"seed of all ({DEFAULT_SEED})")


def _add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    _option(
        group,
        "--nprocs",
        "--nthreads",
        "--n-cpus",
        type=_positive,
        metavar="N",
        help="processors for the whole run (default: what affinity, cgroup and Slurm grant)",
    )
    _option(
        group,
        "--omp-nthreads",
        type=_positive,
        metavar="N",
        help="threads per process (default 1: voxels are then identical on repeat)",
    )
    _option(group, "--mem", "--mem-mb", metavar="N[KMGT]", help="memory for the run (default M)")
    _option(group, "--device", metavar="auto|cpu|cuda[:i]", help="where neural methods run")
    _option(
        group,
        "--use-plugin",
        "--nipype-plugin-file",
        type=Path,
        metavar="FILE",
        help="YAML with a Nipype plugin and its plugin_args",
    )
    _option(
        group,
        "--resource-monitor",
        action="store_true",
        help="record memory and processor use of each node in logs/",
    )
    _option(group, "--sloppy", action="store_true", help="register at 4 mm only; for tests")


def _add_modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other ways to run")
    _option(group, "--dry-run", action="store_true", help="say what would be done")
    _option(group, "--reports-only", action="store_true", help="rebuild the pages only")
    _option(group, "--boilerplate-only", action="store_true", help="write logs/CITATION.md only")


def _add_others(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("others")
    _option(group, "--work-dir", "-w", type=Path, metavar="DIR", help="work files (./work)")
    _option(
        group,
        "--clean-workdir",
        action=argparse.BooleanOptionalAction,
        help="remove a scan's work files when it is done (default: yes)",
    )
    _option(
        group,
        "--config-file",
        type=Path,
        metavar="FILE",
        help="settings as written to logs/ by an earlier run; the command line wins",
    )
    _option(group, "--stop-on-first-crash", action="store_true", help="do not go on after a crash")
    _option(group, "--write-graph", action="store_true", help="write the workflow graph to logs/")
    _option(group, "--debug", action="store_true", help="keep work files, show tracebacks")
    _option(group, "--verbose", "-v", action="count", help="say more (repeatable)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parse and check the command line.

    Raises
    ------
    UsageError
        If options contradict each other.
    SystemExit
        With the exit codes of the execution specification (64 usage, 17 unknown level).
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    if given["analysis_level"] not in LEVELS:
        parser.exit(
            int(ExitCode.UNKNOWN_LEVEL),
            f"bids_harmony: error: unknown analysis level {given['analysis_level']!r}; "
            f"choose {' or '.join(LEVELS)}\n",
        )
    settings: dict[str, Any] = {"work_dir": Path("work")}
    if "config_file" in given:
        settings |= read_config_file(given["config_file"])
        _check_choices(parser, settings, given.pop("config_file"))
    settings |= {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for key in ("bids_dir", "out_dir", "work_dir"):
        settings[key] = settings[key].absolute()
    return checked(Config(**settings))


def _check_choices(parser: argparse.ArgumentParser, settings: dict[str, Any], path: Path) -> None:
    """Hold a configuration file to what the options allow."""
    for action in parser._actions:
        value = settings.get(action.dest)
        if action.type is _positive and isinstance(value, int) and value < 1:
            raise UsageError(f"--config-file {path}: {action.dest} = {value} is not positive")
        for one in value if isinstance(value, tuple) else (value,):
            if action.choices and one is not None and one not in action.choices:
                raise UsageError(
                    f"--config-file {path}: {action.dest} = {one!r} is none of "
                    + ", ".join(map(str, action.choices))
                )
