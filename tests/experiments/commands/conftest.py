"""Commands run in this process, on a model of one small layer and sentences that a word decides."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from modicum.experiments.commands import main
from modicum.models import presets

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "jax"
WORDS = {
    "negative": ("bad", "dull", "awful", "poor", "weak", "cold"),
    "positive": ("good", "great", "fine", "lovely", "superb", "warm"),
}
FILLING = ("the", "film", "was", "very", "and", "a", "story", "of", "it")


class Said(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    error: str


@contextlib.contextmanager
def few_optimizations():
    """Compile fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def modicum():
    """Run a command in this process, its programs compiled with few optimizations: they run but moments."""

    def run(*arguments):
        out, error = io.StringIO(), io.StringIO()
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
        with streams[0], streams[1], few_optimizations():
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        return Said(code, out.getvalue(), error.getvalue())

    return run


@pytest.fixture(scope="session")
def refused(modicum):
    """Run a command that is to be refused; returns the line that says why."""

    def run(*arguments):
        code, out, error = modicum(*arguments)
        lines = error.splitlines()
        assert code == 2, (code, out, error)
        assert len(lines) == 1 and lines[0].startswith("modicum: error: "), error
        return lines[0].removeprefix("modicum: error: ")

    return run


@pytest.fixture(scope="session")
def process():
    """Start a command in a process of its own, with compiled programs kept for all tests."""

    def start(*arguments, devices=1, **options):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        command = [sys.executable, "-m", "modicum", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, env=environment, **pipes)

    return start


@pytest.fixture(scope="session", autouse=True)
def tiny_preset():
    """A preset that compiles in a moment; what a preset is does not matter to a command."""
    shape = replace(presets.quick(), layers=1, width=32, attention=presets.multi_head(2))
    shape = replace(
        shape, mlp=replace(shape.mlp, width=64), positions=replace(shape.positions, max_length=64)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", lambda: shape)
        yield


def sentences(count, seed):
    """Rows like those of SST-2: a text, its label and the label's name."""
    rng = random.Random(seed)
    for number in range(count):
        name = ("negative", "positive")[number % 2]
        words = rng.choices(FILLING, k=rng.randint(2, 6))
        words.insert(rng.randint(0, len(words)), rng.choice(WORDS[name]))
        yield {"text": " ".join(words), "label": number % 2, "label_text": name}


def write_rows(path, rows):
    """A JSONL file of `rows`; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file():
    """`write_rows`, for tests."""
    return write_rows


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with train, dev and test splits."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate({"train": 128, "dev": 32, "test": 40}.items()):
        write_rows(folder / f"{split}.jsonl", sentences(count, seed))
    return folder


SMALL = {"--batch": 4, "--steps": 4}
TRAIN = {"--preset": "tiny", "--vocab": 300, "--length": 16, "--checkpoint-every": 2, **SMALL}
TUNE = {"--length": 64, "--learning-rate": 0.01, **SMALL}


def as_arguments(options):
    """Options as a command line has them."""
    return [str(word) for option in options.items() for word in option]


@pytest.fixture(scope="session")
def train_options():
    """What a tiny training run is asked for."""
    return as_arguments(TRAIN)


@pytest.fixture(scope="session")
def tune_options():
    """What a tiny tuning run is asked for."""
    return as_arguments(TUNE)


@pytest.fixture(scope="session")
def trained(modicum, data, tmp_path_factory):
    """The folder of a finished `modicum train`; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    said = modicum("train", data, "--out", folder, *as_arguments(TRAIN))
    assert said.code == 0, said.error
    return folder


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    """The run folder for a test of its own."""
    return Path(shutil.copytree(trained, tmp_path / "lm"))


@pytest.fixture(scope="session")
def tuned(modicum, data, trained, tmp_path_factory):
    """The folder of a finished `modicum tune … lora`."""
    folder = tmp_path_factory.mktemp("tuned")
    said = modicum("tune", trained, "--data", data, "--out", folder, *as_arguments(TUNE), "lora", "--rank", 2)
    assert said.code == 0, said.error
    return folder / "lora-0.01"


def contents(folder):
    """Path and digest of every file and folder below `folder`."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        )
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture(scope="session")
def contents_of():
    """`contents`, for tests."""
    return contents


@pytest.fixture(scope="session")
def tiny_published(tmp_path_factory):
    """`(family) -> folder` of a small published checkpoint that knows the words of `data`."""
    place = Path(__file__).with_name("tiny_published.py")
    spec = importlib.util.spec_from_file_location("modicum_tiny_published", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words, written = [*FILLING, *WORDS["negative"], *WORDS["positive"], "negative", "positive", "so"], {}

    def folder(family):
        if family not in written:
            place = tmp_path_factory.mktemp("published") / family
            written[family] = module.write(place, family, words)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder with splits of pairs of texts: whether both have a word of the same kind."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (split, count) in enumerate({"train": 96, "dev": 24, "test": 24}.items()):
        both = zip(sentences(count, seed), sentences(count, seed + 10))
        rng = random.Random(seed)
        rows = []
        for one, two in both:
            other = two if rng.random() < 0.5 else next(sentences(1, rng.randint(0, 9)))
            same = int(one["label"] == other["label"])
            rows.append({"one": one["text"], "two": other["text"], "same": same})
        write_rows(folder / f"{split}.jsonl", rows)
    return folder
