"""Local plugins: a lost worker ends the run and is named; failures become one line each."""

import time

import pytest
from nipype.interfaces.utility import Function
from nipype.pipeline.engine import Node, Workflow

from bids_harmony.errors import ExitCode
from bids_harmony.resources import Resources
from bids_harmony.workflows.engine import Engine, read_plugin_file, run_graph
from bids_harmony.workflows.plugins import describe_failure


def kill_self(x):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return x


def refuse(x):
    from bids_harmony.errors import ScanError

    raise ScanError(f"scan-{x}.nii.gz: constant image; check the export")


def fine(x):
    return x


def slow(x):
    import time

    time.sleep(30)
    return x


def environment(x):
    import os
    from pathlib import Path

    names = ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "ANTS_RANDOM_SEED")
    Path(x).write_text(" ".join(os.environ.get(name, "unset") for name in names))
    return x


def graph_of(**functions):
    workflow = Workflow(name="bids_harmony_wf")
    for name, function in functions.items():
        part = Workflow(name=name)
        first = Node(Function(function=function, input_names=["x"], output_names=["x"]), "first")
        first.inputs.x = 1
        second = Node(Function(function=fine, input_names=["x"], output_names=["x"]), "second")
        part.connect(first, "x", second, "x")
        workflow.add_nodes([part])
    return workflow


def engine_in(tmp_path, nprocs=2):
    resources = Resources(nprocs=nprocs, omp_nthreads=1, mem_gb=4, reasons=())
    return Engine(resources=resources, work_dir=tmp_path, seed=7)


def test_killed_worker_ends_the_run_and_names_the_node(tmp_path):
    start = time.monotonic()
    failures = run_graph(
        graph_of(a_wf=kill_self, b_wf=slow), engine_in(tmp_path), n_scans=2, on_node=print
    )
    assert time.monotonic() - start < 25, "the run waited for work that can no longer matter"
    messages = {f.node: f.message for f in failures}
    assert "bids_harmony_wf.a_wf.first" in messages
    assert "out of memory" in messages["bids_harmony_wf.a_wf.first"]
    assert all(f.exit_code == ExitCode.FAILURE for f in failures)


@pytest.mark.parametrize("n_scans", [1, 2], ids=["linear", "pool"])
def test_one_refusal_does_not_stop_the_others(tmp_path, n_scans):
    ended = []
    failures = run_graph(
        graph_of(a_wf=refuse, b_wf=fine),
        engine_in(tmp_path),
        n_scans=n_scans,
        on_node=lambda node, status: ended.append((node, status)),
    )
    assert [f.node for f in failures] == ["bids_harmony_wf.a_wf.first"]
    assert failures[0].message == "scan-1.nii.gz: constant image; check the export"
    assert failures[0].exit_code == ExitCode.DATA
    assert ("bids_harmony_wf.b_wf.second", "end") in ended
    assert not [node for node, _ in ended if node == "bids_harmony_wf.a_wf.second"]


def test_workers_have_threads_and_seed_set(tmp_path):
    workflow = graph_of(a_wf=environment, b_wf=fine)
    workflow.get_node("a_wf").get_node("first").inputs.x = str(tmp_path / "seen.txt")
    run_graph(workflow, engine_in(tmp_path), n_scans=2, on_node=lambda *_: None)
    assert (tmp_path / "seen.txt").read_text() == "1 7"


def use_the_gpu(x, use_gpu):
    import time
    from pathlib import Path

    begin = time.monotonic()
    time.sleep(0.4)
    Path(x).write_text(f"{begin} {time.monotonic()}")
    return x


@pytest.mark.parametrize("gpu", [True, False])
def test_one_node_has_the_gpu_at_a_time(tmp_path, gpu):
    workflow = Workflow(name="bids_harmony_wf")
    for name in ("a", "b"):
        part = Workflow(name=f"{name}_wf")
        names = ["x", "use_gpu"]
        interface = Function(function=use_the_gpu, input_names=names, output_names=["x"])
        interface.inputs.trait_set(x=str(tmp_path / name), use_gpu=gpu)
        part.add_nodes([Node(interface, "first")])
        workflow.add_nodes([part])
    assert run_graph(workflow, engine_in(tmp_path), n_scans=2, on_node=lambda *_: None) == []
    (_, end), (begin, _) = sorted(
        tuple(map(float, (tmp_path / name).read_text().split())) for name in ("a", "b")
    )
    assert (begin >= end) == gpu


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        (
            "x\nbids_harmony.errors.OutputError: cannot write a; free some space\n",
            "cannot write a; free some space",
            ExitCode.CANNOT_CREATE,
        ),
        ("OSError: [Errno 28] No space left on device: 'x'", "no space left", 73),
        ("Traceback\n  File\nValueError: odd\n", "ValueError: odd", ExitCode.FAILURE),
        ("RuntimeError\n", "RuntimeError: ", ExitCode.FAILURE),
    ],
)
def test_describe_failure(text, message, code):
    failure = describe_failure("wf.scan_wf.n4", text)
    assert message in failure.message
    assert failure.exit_code == code


def test_plugin_file(tmp_path):
    from bids_harmony.errors import UsageError

    path = tmp_path / "plugin.yml"
    path.write_text("plugin: MultiProc\nplugin_args: {n_procs: 3}\n")
    assert read_plugin_file(path) == ("MultiProc", {"n_procs": 3})
    path.write_text("n_procs: 3\n")
    with pytest.raises(UsageError, match="plugin: NAME"):
        read_plugin_file(path)


def test_one_process_ends_a_scan_before_the_next(tmp_path):
    ended = []
    run_graph(
        graph_of(a_wf=fine, b_wf=fine, c_wf=fine),
        engine_in(tmp_path, nprocs=1),
        n_scans=3,
        on_node=lambda node, status: ended.append(node.split(".")[1:]),
    )
    assert [node for _, node in ended] == ["first", "second"] * 3
