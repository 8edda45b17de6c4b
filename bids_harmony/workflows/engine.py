"""Run a graph and tell which scans came through."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nipype.pipeline.engine import Workflow

from bids_harmony.bids.write import atomic_write_text, output_error
from bids_harmony.errors import UsageError
from bids_harmony.resources import Resources, thread_environment
from bids_harmony.workflows.plugins import (
    HarmonyLinear,
    HarmonyMultiProc,
    NodeFailure,
    describe_failure,
    set_log_level,
    watched_resources,
)

LOG = logging.getLogger("bids_harmony")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Engine:
    """How graphs are run.

    Attributes
    ----------
    resources
        Processors, threads and memory.
    work_dir
        Base of all work folders.
    seed
        For the environment of workers.
    plugin, plugin_args
        Nipype plugin that the user named, and its arguments; None: ours.
    stop_on_first_crash, verbose
        As on the command line.
    resource_monitor, write_graph
        Where to write the trace of memory and processor use, and the picture of the graph.
    """

    resources: Resources
    work_dir: Path
    seed: int
    plugin: str | None = None
    plugin_args: Mapping[str, Any] = field(default_factory=dict)
    stop_on_first_crash: bool = False
    resource_monitor: Path | None = None
    write_graph: Path | None = None
    verbose: int = 0


def read_plugin_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Plugin name and arguments from a YAML file ``{plugin: ..., plugin_args: {...}}``.

    Raises
    ------
    UsageError
        If the file cannot be read or names no plugin.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--use-plugin {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("plugin"), str):
        raise UsageError(f"--use-plugin {path}: a line 'plugin: NAME' is needed")
    return content["plugin"], dict(content.get("plugin_args") or {})


def run_graph(
    workflow: Workflow,
    engine: Engine,
    *,
    n_scans: int,
    on_node: Callable[[str, str], None],
) -> list[NodeFailure]:
    """Run a graph to its end; failed nodes stop only what depends on them.

    Parameters
    ----------
    workflow
        Graph with one sub-workflow per scan.
    n_scans
        With one scan no pool of workers is started.
    on_node
        Called with a node's full name and ``end`` or ``exception``.

    Returns
    -------
    failures
        One per failed node, empty when all is well.

    Raises
    ------
    OutputError
        If work folder or log cannot be written.
    """
    _configure(workflow, engine)
    if engine.write_graph:
        _draw(workflow, _unused(engine.write_graph, ".dot"))

    def callback(node: Any, status: str) -> None:
        if status in ("end", "exception"):
            on_node(node.fullname, status)

    # Nipype leaves its traces in the current folder
    watched = watched_resources() if engine.resource_monitor else nullcontext()
    with _inside(engine.work_dir), watched:
        plugin = _plugin(engine, n_scans, callback)
        failures = _run(workflow, plugin, engine.work_dir)
    trace = engine.work_dir / workflow.name / "resource_monitor.json"
    if engine.resource_monitor and trace.is_file():
        atomic_write_text(_unused(engine.resource_monitor), trace.read_text())
        for scrap in engine.work_dir.glob(".proc-*"):
            scrap.unlink(missing_ok=True)
    return failures


def _unused(path: Path, extension: str = "") -> Path:
    """The path, or the first ``path_2``, ... that is not there: a run can have several graphs."""
    number, free = 1, path
    while free.with_name(free.name + extension).exists():
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder that is made when it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    with chdir(folder):
        yield


def _run(workflow: Workflow, plugin: Any, work_dir: Path) -> list[NodeFailure]:
    """Run, and collect the failures that the plugin knows or, at worst, the one that it raises."""
    try:
        workflow.run(plugin=plugin)
    except OSError as error:
        raise output_error(work_dir, error) from error
    except Exception as error:  # noqa: BLE001  nipype re-raises the first failure; all are collected
        if not getattr(plugin, "failures", None):
            return [describe_failure(workflow.name, f"{type(error).__name__}: {error}")]
    return list(getattr(plugin, "failures", []))


def _draw(workflow: Workflow, path: Path) -> None:
    """Picture of the graph; without graphviz only its source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        workflow.write_graph(dotfilename=str(path), graph2use="colored", format="svg")
    except OSError as error:
        LOG.warning("--write-graph: %s.dot was written, no picture (%s)", path, error)


def _plugin(engine: Engine, n_scans: int, callback: Callable[[Any, str], None]) -> Any:
    resources = engine.resources
    args: dict[str, Any] = {
        "status_callback": callback,
        "n_procs": resources.nprocs,
        "memory_gb": resources.mem_gb,
        "n_gpu_procs": resources.omp_nthreads,  # one node at a time: its slots are its threads
        "raise_insufficient": False,
        "threads": resources.omp_nthreads,
        "random_seed": engine.seed,
        "log_level": _log_level(engine.verbose),
        "watch": engine.resource_monitor is not None,
        **engine.plugin_args,
    }
    if engine.plugin is not None:
        from nipype.pipeline import plugins

        named = getattr(plugins, f"{engine.plugin}Plugin", None)
        if named is None:
            raise UsageError(f"--use-plugin: Nipype has no plugin {engine.plugin!r}")
        return named(plugin_args=args)
    if n_scans == 1 or resources.nprocs == 1:
        os.environ.update(thread_environment(resources.omp_nthreads, engine.seed))
        return HarmonyLinear(plugin_args=args)
    return HarmonyMultiProc(plugin_args=args)


def _configure(workflow: Workflow, engine: Engine) -> None:
    workflow.base_dir = str(engine.work_dir)
    workflow.config["execution"] = {
        "crashdump_dir": str(engine.work_dir / "crash"),
        "crashfile_format": "txt",
        "poll_sleep_duration": str(_POLL_SECONDS),
        "job_finished_timeout": "60",
        "remove_unnecessary_outputs": "false",
        "create_report": "false",
        "check_version": "false",
        "stop_on_first_crash": str(engine.stop_on_first_crash).lower(),
    }
    set_log_level(_log_level(engine.verbose))


def _log_level(verbose: int) -> int:
    """Nipype's own log is for ``-vv``: our lines say what users need."""
    return logging.CRITICAL if verbose < 2 else logging.INFO
