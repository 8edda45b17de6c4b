"""The `bids_harmony` command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from bids_harmony.config import PROGRESS
from bids_harmony.errors import ExitCode, HarmonyError

LOG = logging.getLogger("bids_harmony")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one analysis level; return the exit code."""
    # nipype asks the network for a newer version unless told not to
    os.environ.update({"NO_ET": "1", "NIPYPE_NO_ET": "1"})
    from bids_harmony.cli.parser import parse_args

    try:
        config = parse_args(argv)
    except HarmonyError as error:
        return _leave(error)
    _start_logging(config.verbose, config.debug)
    try:
        from bids_harmony.cli.levels import run_level

        return int(run_level(config))
    except HarmonyError as error:
        if config.debug:
            LOG.exception("traceback")
        return _leave(error)
    except KeyboardInterrupt:
        print("bids_harmony: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _leave(error: HarmonyError) -> int:
    print(f"bids_harmony: error: {error}", file=sys.stderr)
    return int(error.exit_code)


def _start_logging(verbose: int, debug: bool) -> None:
    level = logging.DEBUG if debug else max(PROGRESS - 5 * verbose, logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("bids_harmony: %(levelname)s: %(message)s"))
    logging.addLevelName(PROGRESS, "progress")
    LOG.handlers[:] = [handler]
    LOG.setLevel(level)
    LOG.propagate = False


__all__ = ["ExitCode", "main"]

if __name__ == "__main__":
    sys.exit(main())
