"""Delta files: bit-exact, free of the backbone, checked against it, whole or not there."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import Adapter, BitFit, Full, LoRA, attach, load_delta, read_header, save_delta

X = jnp.ones((2, 8))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.tanh(nn.Dense(8, name=f"layers_{i}")(x))
        return nn.Dense(3, name="classifier")(x)


SPEC = {
    "layers_{0-1}": [LoRA(2, alpha=3.0, dropout=0.1), Adapter(2, "relu"), BitFit()],
    "classifier": Full(),
}


@pytest.fixture
def made():
    model = Model()
    params = model.init(jax.random.key(0), X)["params"]
    tuned = attach(model, SPEC, exclude=["layers_1"])
    variables = tuned.init(jax.random.key(1), params, X)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    delta = jax.tree.map(
        lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), variables["delta"]
    )
    return model, params, tuned, {**variables, "delta": delta}


def assert_equal_trees(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bit_exact_and_scores_the_same(made, tmp_path):
    model, params, tuned, variables = made
    save_delta(tmp_path / "task", tuned, variables, params, notes={"accuracy": 0.9})
    loaded, found = load_delta(tmp_path / "task", model, params)
    assert loaded == tuned
    assert_equal_trees(found, variables)
    np.testing.assert_array_equal(loaded.apply(found, params, X), tuned.apply(variables, params, X))
    assert read_header(tmp_path / "task")["notes"] == {"accuracy": 0.9}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
def test_round_trip_of_short_floats(made, tmp_path, dtype):
    model, params, tuned, variables = made
    delta = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["delta"])
    variables = {**variables, "delta": delta}
    save_delta(tmp_path, tuned, variables, params)
    assert_equal_trees(load_delta(tmp_path, model, params)[1], variables)


def test_not_numbers_survive(made, tmp_path):
    model, params, tuned, variables = made
    odd = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan).at[-1].set(-0.0), variables["delta"])
    save_delta(tmp_path, tuned, {**variables, "delta": odd}, params)
    assert_equal_trees(load_delta(tmp_path, model, params)[1]["delta"], odd)


def test_the_file_holds_the_delta_only(made, tmp_path):
    _, params, tuned, variables = made
    save_delta(tmp_path, tuned, variables, params)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    numbers = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert numbers < size < numbers + 2500  # the rest is the header
    names = json.loads((tmp_path / "delta.json").read_text())
    assert names["entries"][0] == {
        "name": "~lora",
        "address": "layers_{0-1}",
        "method": "lora",
        "fields": {
            "rank": 2,
            "alpha": 3.0,
            "dropout": 0.1,
            "rank_stabilised": False,
            "initialisation": "uniform",
        },
    }


def test_another_backbone_is_refused_by_both_hashes(made, tmp_path):
    model, params, tuned, variables = made
    save_delta(tmp_path, tuned, variables, params)
    header = read_header(tmp_path)
    other = jax.tree.map(lambda leaf: leaf, params)
    other["layers_0"]["bias"] = other["layers_0"]["bias"].at[3].set(1e-30)
    with pytest.raises(
        InputError, match=f"belongs to backbone {header['backbone']}, the parameters given are"
    ) as e:
        load_delta(tmp_path, model, other)
    assert "\n" not in str(e.value)


def test_a_head_that_the_delta_replaces_may_be_another(made, tmp_path):
    """A classifier is drawn at random before tuning; nobody keeps that draw."""
    model, params, tuned, variables = made
    save_delta(tmp_path, tuned, variables, params)
    fresh = {**params, "classifier": model.init(jax.random.key(99), X)["params"]["classifier"]}
    assert jnp.abs(fresh["classifier"]["kernel"] - params["classifier"]["kernel"]).max() > 0
    loaded, found = load_delta(tmp_path, model, fresh)
    np.testing.assert_array_equal(loaded.apply(found, fresh, X), tuned.apply(variables, params, X))


def test_damage_is_one_line(made, tmp_path):
    model, params, tuned, variables = made

    def message():
        with pytest.raises(InputError) as caught:
            load_delta(tmp_path, model, params)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "delta.json: no such file" in message()
    save_delta(tmp_path, tuned, variables, params)
    (file,) = tmp_path.glob("*.safetensors")
    data, text = file.read_bytes(), (tmp_path / "delta.json").read_text()
    file.write_bytes(data[: len(data) // 2])
    assert "truncated" in message()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "damaged" in message()
    file.unlink()
    assert "no such file, but delta.json names it" in message()
    file.write_bytes(data)
    (tmp_path / "delta.json").write_text(text[: len(text) // 2])
    assert "not valid JSON" in message()
    (tmp_path / "delta.json").write_text(text.replace('"version": 1', '"version": 2'))
    assert "version 2 is not 1" in message()
    (tmp_path / "delta.json").write_text(text.replace('"method": "lora"', '"method": "laura"'))
    assert "unknown delta method 'laura'; known: lora" in message()
    (tmp_path / "delta.json").write_text(text.replace('"rank": 2', '"ranks": 2'))
    assert "does not take its stored fields" in message()
    for part, key in (("tensors", "bytes"), ("entries", "method"), ("entries", "fields")):
        header = json.loads(text)
        del (header[part][0] if part == "entries" else header[part])[key]
        (tmp_path / "delta.json").write_text(json.dumps(header))
        assert f"no {key!r} in it" in message()
    for change, words in {
        '{"entries": 3}': "entries=3 is no list",
        '{"entries": [3]}': "3 stands where an object should",
        '{"notes": 3}': "notes=3 is no dict",
        '{"exclude": [3]}': "exclude=3 is no str",
    }.items():
        (tmp_path / "delta.json").write_text(json.dumps(json.loads(text) | json.loads(change)))
        assert words in message()
    (tmp_path / "delta.json").write_text(text)
    load_delta(tmp_path, model, params)


def test_saving_again_replaces_and_leaves_nothing_behind(made, tmp_path):
    model, params, tuned, variables = made
    for step in range(3):
        newer = {**variables, "delta": jax.tree.map(functools.partial(jnp.add, step), variables["delta"])}
        save_delta(tmp_path, tuned, newer, params)
        assert_equal_trees(load_delta(tmp_path, model, params)[1], newer)
        assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import os, signal, sys
from modicum.research.delta import storage
written = []
real = storage.write_whole
def write(path, data):
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path); real(path, data)
storage.write_whole = write
import jax, jax.numpy as jnp
from modicum.research.delta import Full, attach_leaves, save_delta
params = {"w": jnp.zeros(4)}
tuned = attach_leaves(lambda params: params["w"], {"w": Full()})
save_delta(sys.argv[1], tuned, {"delta": {"w": {"~full": {"value": jnp.ones(4)}}}}, params)
"""


@pytest.mark.parametrize("write", [0, 1])
def test_a_killed_write_leaves_the_delta_before(tmp_path, write):
    from modicum.research.delta import attach_leaves
    from modicum.research.delta.leaves import FunctionModel

    def function(params):
        return params["w"]

    params = {"w": jnp.zeros(4)}
    tuned = attach_leaves(function, {"w": Full()})
    before = {"delta": {"w": {"~full": {"value": jnp.full(4, 7.0)}}}, "delta_state": {}}
    save_delta(tmp_path, tuned, before, params)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(write)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_equal_trees(load_delta(tmp_path, FunctionModel(function), params)[1], before)


def test_a_hash_may_be_given_instead_of_the_weights(made, tmp_path):
    model, params, tuned, variables = made
    save_delta(tmp_path, tuned, variables, backbone="0123456789abcdef")
    with pytest.raises(InputError, match="belongs to backbone 0123456789abcdef"):
        load_delta(tmp_path, model, params)
    with pytest.raises(InputError, match="needs the backbone"):
        save_delta(tmp_path, tuned, variables)


def test_notes_that_are_no_json_are_refused_and_the_delta_before_stays(made, tmp_path):
    model, params, tuned, variables = made
    save_delta(tmp_path, tuned, variables, params)
    with pytest.raises(InputError, match=r"stored as JSON, numbers and text of Python .*float32"):
        save_delta(tmp_path, tuned, variables, params, notes={"accuracy": np.float32(0.5)})
    assert_equal_trees(load_delta(tmp_path, model, params)[1], variables)


def test_delta_imports_with_few_libraries():
    """jax, flax, numpy and safetensors are enough; data sets, command line and optimizers are not loaded."""
    heavy = ("datasets", "grain", "tyro", "rich", "orbax", "optax", "matplotlib")
    code = f"import sys, {{}}; print(*[name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    loaded = {}
    for module in ("flax.linen", "modicum.research.delta"):
        command = [sys.executable, "-c", code.format(module)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path("/"))
        assert done.returncode == 0, done.stderr
        loaded[module] = set(done.stdout.split())
    # Linen itself may load some of them.
    assert loaded["modicum.research.delta"] == loaded["flax.linen"]
