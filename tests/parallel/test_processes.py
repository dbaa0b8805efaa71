"""Two processes of four devices, joined by `jax.distributed` over gloo, train as one process of eight."""

import json
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modicum import InputError
from modicum.parallel import barrier, initialize, is_main

SCRIPT = Path(__file__).with_name("two_processes.py")

pytestmark = pytest.mark.usefixtures("quick_compile")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_two(job, cases, folder, timeout):
    """What both processes saw, process 0 first."""
    coordinator, results = f"localhost:{free_port()}", [folder / f"{index}.json" for index in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), job, coordinator, "2", str(index), str(result), *cases],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, result in enumerate(results)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-2000:] for text in errors)
    return [json.loads(result.read_text()) for result in results]


def check_equal_to_one_process(train, cases, both):
    outcome = runpy.run_path(str(SCRIPT))["outcome"]
    for case in cases:
        mesh, zero, dtype = case.split(":")
        alone = outcome(train, mesh, zero, dtype)
        first, second = (seen["cases"][case] for seen in both)
        assert first == second  # bit for bit: both see the same global values
        assert first["initial"] == alone["initial"]
        if dtype == "float64":
            np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0, atol=1e-10)
        else:
            np.testing.assert_allclose(first["losses"][0], alone["losses"][0], rtol=1e-5)
            drift = max(abs(a - b) for a, b in zip(first["losses"], alone["losses"]))
            print(f"{case}: the loss drifts by {drift:.1e} in {len(alone['losses'])} steps")
            assert drift <= 1e-3


@pytest.mark.slow
def test_two_processes_train_a_toy_as_one(toy, tmp_path):
    cases = ["data=8:3:float64"]
    both = run_two("toy.py", cases, tmp_path, timeout=200)
    assert [seen["processes"] for seen in both] == [2, 2]
    assert [seen["devices"] for seen in both] == [[4, 8], [4, 8]]
    assert [seen["main"] for seen in both] == [True, False]
    # Data parallelism splits the rows; under tensor parallelism across processes both provide all.
    assert [seen["rows"]["data=8"] for seen in both] == [[0, 8], [8, 16]]
    assert [seen["rows"]["tensor=8"] for seen in both] == [[0, 16], [0, 16]]
    check_equal_to_one_process(toy.train, cases, both)


@pytest.mark.slow
def test_two_processes_train_the_decoder_as_one(decoder, tmp_path):
    cases = ["data=4,tensor=2:3:float64", "tensor=8:0:float32"]
    both = run_two("decoder.py", cases, tmp_path, timeout=280)
    check_equal_to_one_process(decoder.train, cases, both)


def test_one_process_needs_no_initialization():
    assert is_main()
    barrier("alone")
    initialize(count=1)
    initialize()  # devices are in use and no launcher is here: nothing to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"count": 2},
            "processes: coordinator and index missing; give all of coordinator, count, index or none",
        ),
        ({"coordinator": "host:1", "count": 2}, "processes: index missing; "),
        ({"coordinator": "host", "count": 2, "index": 0}, "processes: coordinator 'host' is no host:port"),
        (
            {"coordinator": "host:1", "count": 2, "index": 2},
            "processes: index 2 of 2 processes; an index runs from 0",
        ),
    ],
)
def test_incomplete_descriptions_are_named(arguments, message):
    with pytest.raises(InputError) as error:
        initialize(**arguments)
    assert str(error.value).startswith(message)


def test_a_launcher_is_not_overlooked(monkeypatch):
    """Too late to join: devices are in use already, so this must not go on as a run of its own."""
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    with pytest.raises(RuntimeError, match="before any JAX calls"):
        initialize()
