"""Two processes with one device each train, tune and store as one process with two devices."""

import json
import socket

import numpy as np
import pytest

from modicum.research.study.records import read_records

pytestmark = pytest.mark.slow
TRAIN = ["--vocab", 300, "--length", 16, "--batch", 4, "--steps", 3, "--scan"]
TUNE = ["--length", 32, "--batch", 4, "--steps", 2, "--learning-rate", 0.01]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone(process):
    """One process with two simulated devices; returns what it printed."""

    def run(*arguments):
        out, error = (running := process(*arguments, devices=2)).communicate(timeout=240)
        assert running.returncode == 0, error
        return out

    return run


@pytest.fixture(scope="module")
def together(process):
    """Two processes with a device each; returns what each printed."""

    def run(*arguments, method=()):
        join = ["--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process"]
        running = [process(*arguments, *join, index, *method) for index in range(2)]
        try:
            said = [each.communicate(timeout=240) for each in running]
        finally:
            for each in running:
                each.kill()
        assert [each.returncode for each in running] == [0, 0], "\n".join(error for _, error in said)
        return [out for out, _ in said]

    return run


def losses(folder):
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "loss" in record]


def test_train(alone, together, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    mesh = ["--mesh", "data=2", "--zero", "3"]
    alone("train", data, "--out", one, *TRAIN, *mesh)
    first, second = together("train", data, "--out", two, *TRAIN, *mesh)
    assert "the model is in" in first and "two" not in second
    np.testing.assert_allclose(losses(two)[0], losses(one)[0], rtol=1e-5)
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-3)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    np.testing.assert_allclose(results[1]["loss"], results[0]["loss"], atol=1e-3)


def test_tune(alone, together, modicum, data, trained, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["tune", trained, "--data", data, *TUNE, "--mesh", "fsdp=2"]
    alone(*arguments, "--out", one, "lora")
    first, second = together(*arguments, "--out", two, method=["lora"])
    assert first.count("best: ") == 1 and "best" not in second
    folders = [out / "lora-0.01" for out in (one, two)]
    np.testing.assert_allclose(*(losses(folder)[0] for folder in folders), rtol=1e-5)
    evaluated = modicum("evaluate", trained, "--delta", folders[1], "--data", data, "--length", 32)
    accuracy = json.loads((folders[1] / "result.json").read_text())["test_accuracy"]
    assert evaluated.out.split()[-1] == f"{accuracy:.4f}"


def test_processes_need_a_mesh(process, data, tmp_path):
    join = ["--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process"]
    running = [process("train", data, "--out", tmp_path / "out", *TRAIN, *join, index) for index in range(2)]
    for each in running:
        _, error = each.communicate(timeout=120)
        assert each.returncode == 2
        assert "2 processes share a mesh, and none is given; add --mesh data=2" in error
