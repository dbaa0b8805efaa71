"""Of a run that loses a process the others end with one line, and fewer go on where it was."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modicum.experiments.commands.supervision import (
    LOST,
    SUPERVISED,
    copy_messages,
    is_one_of_several,
    last_error,
    lost_line,
    supervise,
)

XLA = """step 4
[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1
W1122 19:53:29.997432   21732 coordination_service.cc:185] [667] Using experimental recoverable tasks.
E1122 19:54:34.162961   23269 coordination_service.cc:1549] Task 1 is unhealthy
1
The tasks have crashed. Check the task logs for an earlier error
F1122 19:54:34.163461   23280 client.h:80] Terminating process because   of Task 1.
*** Check failure stack trace: ***
    @     0x7feb8cd20634  absl::LogMessage::SendToLog()
"""


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_fewer_go_on(tmp_path):
    lost = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("lost.py"))))
    corpus = lost.write_corpus(tmp_path)
    seen = lost.lose_one(corpus, tmp_path / "lost", 2, 1, 1, lost.mesh_of(2, 3))
    print(f"the other process ended after {seen.seconds:.1f} s: {seen.errors[0]}")
    assert seen.seconds < 60
    assert seen.codes == [LOST]
    assert seen.errors[0].count("\n") == 1
    assert seen.errors[0].startswith("modicum: error: another process of this run is gone")
    assert seen.step < lost.STEPS
    resumed = lost.finish(corpus, tmp_path / "lost", 1, 1, [])
    alone = lost.finish(corpus, tmp_path / "alone", 1, 1, [])
    assert sorted(resumed) == sorted(alone) == list(range(1, lost.STEPS + 1))
    drift = [abs(resumed[step] - alone[step]) for step in range(1, min(seen.step + 20, lost.STEPS) + 1)]
    print(f"20 steps after the resumption at {seen.step} the losses are within {max(drift):.1e}")
    assert max(drift) < 1e-3


def test_what_xla_says_is_kept_from_the_user(capsys):
    assert copy_messages(XLA.splitlines(keepends=True)) == XLA.splitlines(keepends=True)[1:]
    assert capsys.readouterr().err == "step 4\n"
    assert copy_messages(["1\n", "    @property\n"]) == []
    assert capsys.readouterr().err == "1\n    @property\n"
    assert last_error(XLA.splitlines(keepends=True)[1:]) == "Terminating process because   of Task 1."
    assert last_error([]) == ""
    assert "(Terminating process because of Task 1.)" in lost_line("Terminating process because   of Task 1.")
    assert lost_line("").count("\n") == 0


@pytest.mark.parametrize(
    ("child", "code", "said"),
    [
        ("print('a', file=sys.stderr); sys.exit(2)", 2, "a\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
        (
            "print('F1122 19:54:34.163461 1 client.h:8] heartbeat', file=sys.stderr, flush=True); os.abort()",
            LOST,
            f"modicum: error: {lost_line('heartbeat')}\n",
        ),
        (
            "print('*** Check failure stack trace: ***', file=sys.stderr, flush=True); os.abort()",
            134,
            "*** Check failure stack trace: ***\nmodicum: error: ended by SIGABRT\n",
        ),
    ],
    ids=["exit", "signal", "lost", "crash"],
)
def test_the_childs_end_is_the_parents(child, code, said, capsys, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    script = f"import os, resource, signal, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {child}"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: start([command[0], "-c", script], **how))
    try:
        assert supervise(["train"]) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_terminal_is_handed_on_for_the_progress_bar(monkeypatch):
    """The child's standard error stays a pipe, and its bar sees a terminal all the same."""
    script = (
        "import sys; from modicum.experiments.commands.progress import console; screen = console(); "
        "screen.print('drawn'); sys.exit(not screen.is_terminal or sys.stderr.isatty())"
    )
    ours, theirs = os.openpty()
    start, before = subprocess.Popen, [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: start([command[0], "-c", script], **how))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        try:
            assert supervise(["train"]) == 0
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
        assert b"drawn" in os.read(ours, 1000)
    os.close(ours)


def test_only_several_processes_are_watched(monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert not is_one_of_several(["train", "data"])
    assert not is_one_of_several(["train", "data", "--processes", "1"])
    assert is_one_of_several(["train", "data", "--processes", "2"])
    assert is_one_of_several(["train", "data", "--processes=2"])
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    assert is_one_of_several(["train", "data"])
    monkeypatch.setenv(SUPERVISED, "1")
    assert not is_one_of_several(["train", "data", "--processes", "2"])
