"""The command as a process: help at once, one line for what is wrong, the way `python -m modicum` ends."""

import resource
import subprocess
import sys

import pytest

from modicum import __version__
from modicum.experiments.commands import verbs

WITHOUT_JAX = """
import sys
from modicum.experiments.commands import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"jax", "jaxlib", "flax", "datasets", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def cpu_seconds(command):
    """CPU time of a process, which a busy machine does not stretch as it does the time on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["tune", "--help"], ["--version"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments, capfd):
    assert cpu_seconds([sys.executable, "-c", WITHOUT_JAX, *arguments]) < 1.5
    out = capfd.readouterr().out
    assert "modicum" in out


def test_help_lists_every_verb(modicum):
    code, out, _ = modicum("--help")
    assert code == 0
    for name in verbs():
        assert name in out
        assert modicum(name, "--help").code == 0


def test_version(modicum):
    assert modicum("--version") == (0, f"modicum {__version__}\n", "")


def test_a_process_says_one_line_and_ends_with_2(process, tmp_path):
    out, error = (running := process("train", tmp_path / "none.jsonl")).communicate(timeout=120)
    assert (running.returncode, out) == (2, "")
    assert error == f"modicum: error: {tmp_path / 'none.jsonl'}: no such file or folder\n"
