"""What a run may use: user, Slurm, container, machine."""

from __future__ import annotations

import os

import pytest

from bids_harmony.errors import UsageError
from bids_harmony.resources import detect, parse_memory, pick_device, thread_environment


def limits(tmp_path, cpu="max 100000", memory="max"):
    (tmp_path / "cpu.max").write_text(cpu)
    (tmp_path / "memory.max").write_text(memory)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "amount"),
    [("16G", 16), ("2048", 2), ("512M", 0.5), ("1T", 1024), ("1.5GiB", 1.5), (" 4 gb ", 4),
     ("1048576K", 1)],
)  # fmt: skip
def test_memory(text, amount):
    assert parse_memory(text) == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "lots", "0", "-4G", "4X", "G"])
def test_no_memory(text):
    with pytest.raises(UsageError, match="write for example 16G"):
        parse_memory(text)


def test_the_user_wins(tmp_path):
    found = detect(7, 2, 3.0, env={"SLURM_CPUS_PER_TASK": "1"}, cgroup=limits(tmp_path))
    assert (found.nprocs, found.omp_nthreads, found.mem_gb) == (7, 2, 3.0)
    assert "--nprocs" in found.reasons[0]


def test_the_smallest_grant_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    free = limits(tmp_path)
    assert detect(env={}, cgroup=free).nprocs == 16
    assert detect(env={"SLURM_CPUS_PER_TASK": "4"}, cgroup=free).nprocs == 4
    found = detect(env={"SLURM_CPUS_PER_TASK": "4"}, cgroup=limits(tmp_path, "250000 100000"))
    assert (found.nprocs, "cgroup" in found.reasons[0]) == (2, True)
    assert detect(env={}, cgroup=limits(tmp_path, "50000 100000")).nprocs == 1
    assert detect(env={}, cgroup=tmp_path / "none").nprocs == 16


def test_memory_grants(tmp_path):
    found = detect(env={}, cgroup=limits(tmp_path, memory=str(2**30)))
    assert found.mem_gb == pytest.approx(0.9)
    assert "cgroup memory.max" in found.reasons[2]
    free = limits(tmp_path)
    assert detect(env={"SLURM_MEM_PER_NODE": "1024"}, cgroup=free).mem_gb == pytest.approx(0.9)
    slurm = {"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_PER_TASK": "2"}
    assert detect(env=slurm, cgroup=free).mem_gb == pytest.approx(0.9)


def test_more_threads_than_processors():
    with pytest.raises(UsageError, match="lower it or raise --nprocs"):
        detect(2, 3, 1.0)


def test_device():
    assert pick_device("auto", ("cpu",))[0] == "cpu"
    assert pick_device("cpu", ("cpu", "cuda"))[0] == "cpu"
    with pytest.raises(UsageError, match="CPU only"):
        pick_device("cuda:0", ("cpu",))
    with pytest.raises(UsageError, match="none of auto"):
        pick_device("gpu", ("cpu", "cuda"))


def test_thread_environment():
    made = thread_environment(3, 11)
    assert made["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == made["OMP_NUM_THREADS"] == "3"
    assert made["ANTS_RANDOM_SEED"] == "11"
