"""Local Nipype plugins that collect failures by node and never hang on a lost worker."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import sleep
from traceback import format_exception
from typing import Any

from nipype.pipeline.plugins.base import PluginBase
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node
from nipype.utils.misc import str2bool

from bids_harmony.errors import ExitCode
from bids_harmony.resources import thread_environment

_HARMONY_ERROR = re.compile(r"^\s*bids_harmony\.errors\.(\w+): (.+)$", re.MULTILINE)
_ANY_ERROR = re.compile(r"^\s*([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\w*)(?:: (.*))?$", re.M)
_EXIT_CODES = {
    "ScanError": ExitCode.DATA,
    "OutputError": ExitCode.CANNOT_CREATE,
    "MissingInputError": ExitCode.NO_INPUT,
    "UsageError": ExitCode.USAGE,
}
_WARM_UP_SECONDS = 0.3
_LOST_WORKER = (
    "the worker process was killed, probably out of memory: lower --nprocs, raise --mem, "
    "or run fewer scans at once"
)


@dataclass(frozen=True)
class NodeFailure:
    """One node that failed.

    Attributes
    ----------
    node
        Full name, e.g. ``bids_harmony_wf.sub_01_T1w_wf.n4``.
    message
        One line for the user.
    exit_code
        What the process should leave with when this is the only failure.
    traceback
        The whole text.
    """

    node: str
    message: str
    exit_code: ExitCode
    traceback: str


def describe_failure(node: str, traceback: str) -> NodeFailure:
    """Find the one line that tells the user what happened."""
    if _LOST_WORKER in traceback:
        return NodeFailure(node, _LOST_WORKER, ExitCode.FAILURE, traceback)
    if known := _HARMONY_ERROR.findall(traceback):
        kind, message = known[-1]
        return NodeFailure(node, message, _EXIT_CODES.get(kind, ExitCode.FAILURE), traceback)
    if "No space left on device" in traceback:
        message = "no space left on the disk of the work folder or OUT_DIR; free some, or use -w"
        return NodeFailure(node, message, ExitCode.CANNOT_CREATE, traceback)
    found = _ANY_ERROR.findall(traceback)
    name, text = found[-1] if found else ("unknown error", traceback.strip()[-200:])
    return NodeFailure(node, f"{name}: {text}", ExitCode.FAILURE, traceback)


class HarmonyLinear(PluginBase):
    """One node after the other in this process, scan by scan; failures are collected."""

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args=plugin_args)
        self.failures: list[NodeFailure] = []

    def run(self, graph: Any, config: Any, updatehash: bool = False) -> None:
        """Run every node whose predecessors came through."""
        import networkx as nx

        lost: set[Any] = set()
        order = {node: place for place, node in enumerate(nx.topological_sort(graph))}
        scans = [
            sorted(part, key=order.__getitem__) for part in nx.weakly_connected_components(graph)
        ]
        # one scan to its end before the next, so that a killed run leaves finished ones
        for node in (n for part in sorted(scans, key=lambda p: order[p[0]]) for n in part):
            if node in lost:
                continue
            status = "end"
            try:
                node.run(updatehash=updatehash)
            except Exception:  # noqa: BLE001  any failure of a node is recorded, the rest goes on
                text = "".join(format_exception(*sys.exc_info()))
                self.failures.append(describe_failure(node.fullname, text))
                lost |= nx.descendants(graph, node)
                status = "exception"
            if self._status_callback:
                self._status_callback(node, status)
            if self.failures and str2bool(config["execution"]["stop_on_first_crash"]):
                return


def _prepare_worker(cwd: str, environment: dict[str, str], log_level: int, watch: bool) -> None:
    """Bound threads and seed before any library is loaded in the worker; quieten its log."""
    os.chdir(cwd)
    os.environ.update(environment)
    set_log_level(log_level)
    if watch:
        watch_resources()


def watch_resources() -> None:
    """Let Nipype record memory and processor use of the nodes that this process runs."""
    from nipype import config

    config.enable_resource_monitor()


@contextmanager
def watched_resources() -> Iterator[None]:
    """`watch_resources` for a while: later nodes of this process leave no traces."""
    from nipype import config

    watch_resources()
    try:
        yield
    finally:
        config.disable_resource_monitor()


def set_log_level(level: int) -> None:
    """Level of Nipype's own loggers in this process."""
    for name in ("nipype.workflow", "nipype.interface", "nipype.utils"):
        logging.getLogger(name).setLevel(level)


class HarmonyMultiProc(MultiProcPlugin):
    """MultiProc that ends within seconds when a worker dies, naming the nodes that were lost.

    Nipype's own plugin reads the result inside the future's callback; when the worker was killed
    this raises, nothing is recorded, and the run waits for ever. Here every future ends in a
    result.
    """

    pool: Any

    def __init__(self, plugin_args: dict[str, Any] | None = None) -> None:
        super().__init__(plugin_args=plugin_args)
        self.failures: list[NodeFailure] = []
        self.pool.shutdown()
        args = self.plugin_args
        self.pool = ProcessPoolExecutor(
            max_workers=self.processors,
            mp_context=multiprocessing.get_context("forkserver"),
            initializer=_prepare_worker,
            initargs=(
                self._cwd,
                thread_environment(args.get("threads", 1), args.get("random_seed", 0)),
                args.get("log_level", logging.CRITICAL),
                args.get("watch", False),
            ),
        )
        # The pool watches only the workers that lived when it last woke: start all of them now,
        # so that every later submission wakes it with the full list.
        for _ in range(self.processors):
            self.pool.submit(sleep, _WARM_UP_SECONDS)

    def _sort_jobs(self, jobids: Any, scheduler: str | None = "tsort") -> list[Any]:
        """Finish one scan before the next is begun: results come early, work folders stay few."""
        scans = [proc.fullname.split(".")[1] for proc in self.procs]
        order = {scan: index for index, scan in enumerate(sorted(set(scans)))}
        return sorted(jobids, key=lambda job: (order[scans[job]], job))

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        taskid = self._taskid
        try:
            future = self.pool.submit(run_node, node, updatehash, taskid)
        except BrokenProcessPool:
            # the pool died with an earlier node: this one was never started
            self._task_obj[taskid] = None
            self._taskresult[taskid] = self._lost(taskid, "not started: ")
            return taskid
        self._task_obj[taskid] = future
        future.add_done_callback(partial(self._record, taskid))
        return taskid

    def _record(self, taskid: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            self._taskresult[taskid] = future.result()
        elif isinstance(error, BrokenProcessPool):
            self._taskresult[taskid] = self._lost(taskid)
        else:
            lines = format_exception(type(error), error, error.__traceback__)
            self._taskresult[taskid] = {"result": None, "traceback": lines, "taskid": taskid}

    @staticmethod
    def _lost(taskid: int, prefix: str = "") -> dict[str, Any]:
        return {"result": None, "traceback": [f"{prefix}{_LOST_WORKER}\n"], "taskid": taskid}

    def _report_crash(self, node: Any, result: dict[str, Any] | None = None) -> str:
        text = "".join((result or {}).get("traceback") or [])
        self.failures.append(describe_failure(node.fullname, text))
        return str(super()._report_crash(node, result=result))
