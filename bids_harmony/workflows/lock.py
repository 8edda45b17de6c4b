"""Concurrent jobs that make the same thing make it in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_at_a_time(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold the lock ``folder/.NAME`` where the file system has locks.

    Without locks the jobs work at the same time and make the same thing.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}").open("w") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
