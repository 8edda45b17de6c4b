"""``bids_harmony-phantom``: write a BIDS data set of simulated travelling subjects."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from bids_harmony._version import __version__
from bids_harmony.errors import ExitCode, HarmonyError, UsageError

#: Of adults: what is simulated unless sites are named.
SITES = ("mprage3", "mprage15", "spgr3", "spgr15", "thick15", "biased3")
MODALITIES = ("T1w", "T2w", "FLAIR")


class _Parser(argparse.ArgumentParser):
    """Reports mistakes with the exit code of the BIDS Apps specification."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Command line of the phantom."""
    parser = _Parser(
        prog="bids_harmony-phantom",
        description="Write a BIDS data set of simulated travelling subjects.",
        epilog="Sites: mprage3 (reference domain), mprage15, spgr3, spgr15, thick15 (thick "
        "slices), biased3 (strong bias field), infant3 (infants: grey and white matter alike). "
        "The truth goes to derivatives/phantom.",
    )
    add = parser.add_argument
    add("bids_dir", type=Path, metavar="BIDS_DIR", help="new or empty folder")
    add("--subjects", type=int, default=6, metavar="N", help="how many subjects [6]")
    add("--sites", nargs="+", default=list(SITES), metavar="NAME", help="sites [all but infant3]")
    add("--modality", nargs="+", default=["T1w"], choices=MODALITIES, help="[T1w]")
    add(
        "--travelling",
        type=int,
        metavar="N",
        help="subjects scanned at every site; the others at one site each, in turn [all]",
    )
    add(
        "--resolution",
        type=float,
        metavar="MM",
        help="smallest voxel edge of every scan [each site's own, about 1 mm]",
    )
    add(
        "--lesions",
        nargs="?",
        type=float,
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="white-matter hyperintensities that grow with age, in this share of the subjects "
        "[without a value: in all]",
    )
    add(
        "--truths",
        nargs="+",
        default=["mprage3"],
        metavar="NAME",
        help="sites in whose contrast each scan's truth is written, beside its own [mprage3]",
    )
    add("--random-seed", type=int, default=0, metavar="S", help="same seed, same files [0]")
    add("--workers", type=int, default=1, metavar="N", help="processes [1]")
    add("-v", "--verbose", action="store_true", help="say what is being written")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments without the program name; None for those of the process.

    Returns
    -------
    Exit code.
    """
    try:
        options = build_parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
        # numpy and scipy take a second to import: not for --help
        from bids_harmony.phantom.dataset import write_phantom

        write_phantom(
            options.bids_dir,
            subjects=options.subjects,
            sites=options.sites,
            modalities=options.modality,
            travelling=options.travelling,
            resolution=options.resolution,
            lesions=options.lesions,
            seed=options.random_seed,
            workers=options.workers,
            truths=options.truths,
        )
    except HarmonyError as error:
        print(f"bids_harmony-phantom: {error}", file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
