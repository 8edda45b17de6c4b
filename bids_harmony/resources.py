"""Processor, memory and GPU policy: what the run may use, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bids_harmony.errors import UsageError

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes
    ----------
    nprocs
        Processors for the whole run.
    omp_nthreads
        Threads per process.
    mem_gb
        Memory for the whole run in GiB.
    reasons
        Where each number comes from, for the log.
    """

    nprocs: int
    omp_nthreads: int
    mem_gb: float
    reasons: tuple[str, ...]


def parse_memory(text: str) -> float:
    """Memory in GiB from a number with an optional unit K, M, G or T (default M, as in NiPreps).

    Raises
    ------
    UsageError
        If `text` is no positive amount.

    Examples
    --------
    >>> parse_memory("16G")
    16.0
    >>> parse_memory("2048")
    2.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--mem {text!r} is no amount of memory; write for example 16G or 16000M")
    return float(match[1]) * _UNITS[(match[2] or "M").upper()] / 2**30


def detect(
    nprocs: int | None = None,
    omp_nthreads: int | None = None,
    mem_gb: float | None = None,
    env: Mapping[str, str] | None = None,
    cgroup: Path = _CGROUP,
) -> Resources:
    """Take what the user asks for, else what scheduler, container and machine really grant.

    Raises
    ------
    UsageError
        If more threads per process than processors are asked for.
    """
    env = os.environ if env is None else env
    procs, why_procs = (nprocs, "--nprocs") if nprocs else _granted_processors(env, cgroup)
    memory, why_mem = (mem_gb, "--mem") if mem_gb else _granted_memory(env, cgroup)
    threads = omp_nthreads or 1
    if threads > procs:
        raise UsageError(
            f"--omp-nthreads {threads} is more than the {procs} processors ({why_procs}); "
            "lower it or raise --nprocs"
        )
    return Resources(
        nprocs=procs,
        omp_nthreads=threads,
        mem_gb=memory,
        reasons=(
            f"{procs} processors ({why_procs})",
            f"{threads} threads per process ({'--omp-nthreads' if omp_nthreads else 'default'})",
            f"{memory:.1f} GB memory ({why_mem})",
        ),
    )


def _granted_processors(env: Mapping[str, str], cgroup: Path) -> tuple[int, str]:
    """Smallest of affinity, cgroup quota and Slurm allocation."""
    grants = [(len(os.sched_getaffinity(0)), "processor affinity")]
    quota = _read(cgroup / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        grants.append((max(1, int(quota[0]) // int(quota[1])), "cgroup cpu.max"))
    if env.get("SLURM_CPUS_PER_TASK", "").isdigit():
        grants.append((max(1, int(env["SLURM_CPUS_PER_TASK"])), "SLURM_CPUS_PER_TASK"))
    return min(grants)


def _granted_memory(env: Mapping[str, str], cgroup: Path) -> tuple[float, str]:
    """Smallest of machine, cgroup and Slurm memory, less a margin, in GiB."""
    import psutil

    grants = [(psutil.virtual_memory().total / 2**30, "machine")]
    limit = _read(cgroup / "memory.max").strip()
    if limit.isdigit():
        grants.append((int(limit) / 2**30, "cgroup memory.max"))
    if env.get("SLURM_MEM_PER_NODE", "").isdigit():
        grants.append((int(env["SLURM_MEM_PER_NODE"]) / 1024, "SLURM_MEM_PER_NODE"))
    elif env.get("SLURM_MEM_PER_CPU", "").isdigit():
        cpus = int(env.get("SLURM_CPUS_ON_NODE") or env.get("SLURM_CPUS_PER_TASK") or 1)
        grants.append((int(env["SLURM_MEM_PER_CPU"]) * cpus / 1024, "SLURM_MEM_PER_CPU"))
    amount, why = min(grants)
    return amount * _MEMORY_SHARE, f"{_MEMORY_SHARE:.0%} of {why}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def pick_device(asked: str, supported: tuple[str, ...]) -> tuple[str, str]:
    """Device for a method: ``cpu`` or ``cuda[:i]``, and a sentence that says why.

    Parameters
    ----------
    asked
        ``auto``, ``cpu`` or ``cuda[:i]``.
    supported
        Kinds of device the method's card names.

    Raises
    ------
    UsageError
        If ``cuda`` is asked for and the method or the machine has none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", asked):
        raise UsageError(f"--device {asked!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
    if asked == "cpu":
        return "cpu", "asked for"
    if "cuda" not in supported:
        if asked == "auto":
            return "cpu", "the method needs no GPU"
        raise UsageError(f"--device {asked}: the method runs on the CPU only; use --device auto")
    return _cuda(asked)


def _cuda(asked: str) -> tuple[str, str]:
    try:
        import torch
    except ImportError:
        count = 0
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(asked.partition(":")[2] or 0)
    if index < count:
        return f"cuda:{index}", f"{count} GPU(s) found"
    if asked == "auto":
        return "cpu", "no GPU found"
    raise UsageError(f"--device {asked}: {count} GPU(s) found; use --device auto or cpu")


def thread_environment(threads: int, seed: int) -> dict[str, str]:
    """Environment that bounds threads and seeds ANTs; set it before those libraries load."""
    count = str(threads)
    return {
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": count,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "ANTS_RANDOM_SEED": str(seed),
    }
