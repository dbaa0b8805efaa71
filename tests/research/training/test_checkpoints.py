"""Checkpoints come back bit for bit on any mesh, and damage is never restored."""

import datetime
import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modicum import InputError
from modicum.research.training.checkpoint_record import Record, Unreadable
from modicum.research.training.checkpoints import Checkpoints, checkpoint_steps, load_arrays
from modicum.research.training.fingerprint import combined, fingerprint

SPECS = {"kernel": PartitionSpec("data", "tensor"), "bias": PartitionSpec("tensor")}


class Moments(NamedTuple):
    mean: Any
    square: Any


def make_state(seed: int = 0, width: int = 16) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    params = {"layers_0": {"kernel": draw(size=(32, width)), "bias": draw(size=width)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    moments = Moments(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), jax.tree.map(jnp.square, params)
    )
    return {"step": jnp.int32(seed), "trainable": params, "optimizer": (moments, None, [jnp.int32(7)])}


def mesh_of(count: int) -> Mesh:
    shape = {8: (4, 2), 2: (1, 2), 1: (1, 1)}[count]
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "tensor"))


def placed(state: Any, mesh: Mesh) -> Any:
    def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return NamedSharding(mesh, SPECS.get(name, PartitionSpec()))

    return jax.device_put(state, jax.tree_util.tree_map_with_path(sharding, state))


def abstract_of(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> None:
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"losses": [0.1 * step]})


def files_of(folder: Path, step: int) -> list[Path]:
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [8, 2, 1])
def test_saved_on_eight_devices_restored_on_fewer(tmp_path: Path, count: int) -> None:
    state = placed(make_state(), mesh_of(8))
    target = abstract_of(placed(make_state(5), mesh_of(count)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(12, state, {"losses": [0.5, 1e-9]})
        restored = checkpoints.restore(target)
    assert restored is not None
    assert (restored.step, restored.metadata) == (12, {"losses": [0.5, 1e-9]})
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert fingerprint(restored.state) == fingerprint(state)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, target)


def test_saved_on_one_device_restored_on_eight(tmp_path: Path) -> None:
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract_of(placed(make_state(), mesh_of(8))))
    assert restored is not None and fingerprint(restored.state) == fingerprint(state)
    assert len(restored.state["trainable"]["layers_0"]["kernel"].sharding.device_set) == 8


def test_no_checkpoint_is_none_and_makes_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "absent"
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(abstract_of(make_state())) is None
        assert checkpoints.best_step() is None
    assert not folder.exists()


def test_leaves_of_every_kind(tmp_path: Path) -> None:
    state = {
        "host": np.arange(3.0),  # float64, which jax would narrow
        "numpy": np.float32(2.5),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "scalar": jnp.float16(0.1),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 8),
        "name": "frozen",
        "count": 7,
        "rate": 0.1 + 0.2,
        "on": True,
        "none": None,
        "a.b": {"c.d": jnp.ones(2)},
        "a": {"b": {"c": {"d": jnp.zeros(2)}}},
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(state)
    assert restored is not None
    same = jax.tree.map(lambda a, b: type(a) is type(b) or isinstance(a, np.ndarray), restored.state, state)
    assert all(jax.tree.leaves(same))
    assert restored.state["host"].dtype == np.float64
    values = {"name", "count", "rate", "on", "none"}
    assert {key: restored.state[key] for key in values} == {key: state[key] for key in values}
    arrays = {key: leaf for key, leaf in state.items() if key not in values}
    assert fingerprint({key: restored.state[key] for key in arrays}) == fingerprint(arrays)
    assert restored.state["keys"].dtype == state["keys"].dtype


def test_a_state_without_arrays(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"count": 3})
        restored = checkpoints.restore({"count": 0})
    assert restored is not None and restored.state == {"count": 3}


def test_a_leaf_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="made is a date"):
        checkpoints.save(1, {"made": datetime.date(2020, 1, 1)})


def test_donated_arrays_are_saved_as_they_were(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {f"w{i}": jnp.full((256, 128), float(i)) for i in range(4)}
    digests = {}
    with Checkpoints(tmp_path, keep=20) as checkpoints:
        for number in range(1, 6):
            state = step(state)
            digests[number] = combined(state)
            checkpoints.save(number, state)
        for _ in range(10):
            state = step(state)
        target = abstract_of(state)
        for number, digest in digests.items():
            restored = checkpoints.restore(target, number)
            assert restored is not None and combined(restored.state) == digest


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 0.5, 3: 0.7, 4: float("nan"), 5: 0.9, 6: 0.8}
    with Checkpoints(tmp_path, keep=2, best=("loss", "min")) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"x": jnp.ones(2)}, metrics={"loss": loss})
        assert checkpoints.best_step() == 2
    assert checkpoint_steps(tmp_path) == [2, 5, 6]
    with Checkpoints(
        tmp_path, keep=1, best=("loss", "min"), keep_best=2
    ) as again:  # knows them after a restart
        again.save(7, {"x": jnp.ones(2)})
        assert again.best_step() == 2
    assert checkpoint_steps(tmp_path) == [2, 6, 7]
    assert Checkpoints(tmp_path, best=("loss", "max")).best_step() == 6


def test_due_and_bad_settings() -> None:
    checkpoints = Checkpoints(Path("unused"), interval=50)
    assert [step for step in range(151) if checkpoints.due(step)] == [0, 50, 100, 150]
    with pytest.raises(InputError, match="keep is 0"):
        Checkpoints(Path("unused"), keep=0)
    with pytest.raises(InputError, match="best is"):
        Checkpoints(Path("unused"), best=("loss", "lowest"))  # type: ignore[arg-type]


def test_saving_twice_and_saving_into_the_past(tmp_path: Path) -> None:
    saved(tmp_path, (4, 8))
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(8, make_state(0), wait=True)
        with pytest.raises(InputError, match="newer step 8 is there"):
            checkpoints.save(6, make_state(6))
        restored = checkpoints.restore(abstract_of(make_state()))
    assert restored is not None and int(restored.state["step"]) == 8


def test_a_missing_metric_is_named(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path, best=("loss", "min")) as checkpoints,
        pytest.raises(InputError, match="'loss' is not among accuracy"),
    ):
        checkpoints.save(1, make_state(), metrics={"accuracy": 1.0})


def test_an_asked_for_step_that_is_not_there(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint of step 9; there are: 1, 2, 3"):
        Checkpoints(tmp_path).restore(abstract_of(make_state()), 9)


def test_another_model_is_an_error_and_not_a_fallback(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path).restore(abstract_of(make_state(width=8)))
    message = str(caught.value)
    assert "another model" in message and "\n" not in message
    assert "optimizer/0/mean/layers_0/bias is bfloat16[16] in it, bfloat16[8] here" in message
    assert "and 3 more leaves differ" in message
    other = make_state()
    other["trainable"]["layers_1"] = other["trainable"].pop("layers_0")
    with pytest.raises(InputError, match=r"trainable/layers_0/bias float32\[16\] is only in it"):
        Checkpoints(tmp_path).restore(abstract_of(other))
    halved = jax.tree.map(lambda x: x.astype(jnp.float16), make_state())
    with pytest.raises(InputError, match=r"bfloat16\[16\] in it, float16\[16\] here"):
        Checkpoints(tmp_path).restore(abstract_of(halved))


def test_half_written_folders_are_never_picked(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ["9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1700000000", "notes"]:
        shutil.copytree(tmp_path / "3", tmp_path / name)
    assert checkpoint_steps(tmp_path) == [1, 2, 3]
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract_of(make_state()))
        assert restored is not None and restored.step == 3
        assert checkpoints.save(9, make_state(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "9", "notes"]


@pytest.mark.parametrize("damage", ["truncated", "record", "no record", "emptied", "no state"])
def test_a_damaged_newest_step_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    newest = tmp_path / "3"
    if damage == "truncated":
        for path in files_of(tmp_path, 3):
            if path.parent.name == "d":  # OCDBT's data files
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "record":
        record = json.loads((newest / "record" / "metadata").read_text())
        record["metadata"]["losses"] = [9.0]
        (newest / "record" / "metadata").write_text(json.dumps(record))
    elif damage == "no record":
        (newest / "record" / "metadata").unlink()
    elif damage == "emptied":
        for path in files_of(tmp_path, 3):
            if "record" not in path.parts:
                path.write_bytes(b"")
    else:
        shutil.rmtree(newest / "state")
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract_of(make_state()))
        assert restored is not None and restored.step == 2
        assert restored.metadata == {"losses": [0.2]}
        assert fingerprint(restored.state) == fingerprint(make_state(2))
        ours = [record.getMessage() for record in caplog.records if "modicum" in record.name]
        assert len(ours) == 1 and "step 3: " in ours[0] and "going back to step 2" in ours[0]
        assert (tmp_path / "3").exists()  # reading changes nothing
        assert checkpoints.save(3, make_state(33), wait=True)  # the number is free for the run that goes on
        again = checkpoints.restore(abstract_of(make_state()))
    assert again is not None and (again.step, int(again.state["step"])) == (3, 33)
    assert (tmp_path / "3.damaged").is_dir()
    assert checkpoint_steps(tmp_path) == [1, 2, 3]


def test_nothing_good_left(tmp_path: Path) -> None:
    saved(tmp_path)
    for step in (1, 2, 3):
        (tmp_path / str(step) / "record" / "metadata").write_text("{")
    with pytest.raises(
        InputError, match=r"step 3: its record.*step 2: its record.*step 1: its record"
    ) as caught:
        Checkpoints(tmp_path).restore(abstract_of(make_state()))
    assert str(tmp_path) in str(caught.value)


def flip_bits(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Flip one bit at a time anywhere in the newest step; returns how often it was seen and harmless."""
    target, want = abstract_of(make_state()), {step: fingerprint(make_state(step)) for step in (2, 3)}
    draw, seen = random.Random(seed), 0
    files = [path for path in files_of(folder, 3) if path.stat().st_size]
    for number in range(count):
        path = draw.choice(files) if number % 2 else max(files, key=lambda each: each.stat().st_size)
        before = path.read_bytes()
        flipped = bytearray(before)
        flipped[draw.randrange(len(before))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        restored = Checkpoints(folder).restore(target)
        assert restored is not None, path
        assert fingerprint(restored.state) == want[restored.step], path
        assert restored.metadata == {"losses": [0.1 * restored.step]}, path
        seen += restored.step == 2
        path.write_bytes(before)
    return seen, count - seen


def test_a_few_flipped_bits(tmp_path: Path) -> None:
    saved(tmp_path, (2, 3))
    seen, _ = flip_bits(tmp_path, 8, seed=0)
    assert seen > 0


@pytest.mark.slow
def test_many_flipped_bits(tmp_path: Path, often: Callable[[int, int], int]) -> None:
    saved(tmp_path, (2, 3))
    count = often(30, 240)
    seen, harmless = flip_bits(tmp_path, count, seed=1)
    assert seen > count // 6, (seen, harmless)


SAVE_FOREVER = """
import sys, jax, jax.numpy as jnp
from modicum.research.training.checkpoints import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    state = {f"w{i}": jnp.zeros((512, 512)) for i in range(4)}
    restored = checkpoints.restore(state)
    step = restored.step if restored else 0
    print(step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, jax.tree.map(lambda x: x + step, state), {"step": step})
"""


@pytest.mark.slow
def test_killed_at_random_moments(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, often: Callable[[int, int], int]
) -> None:
    target = {f"w{i}": jnp.zeros((512, 512)) for i in range(4)}
    draw, reached = random.Random(0), 0
    for _ in range(often(3, 20)):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == reached  # it goes on where the one before was killed
            while max(checkpoint_steps(tmp_path), default=0) <= reached:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.3))
            process.kill()
        restored = Checkpoints(tmp_path).restore(target)
        assert restored is not None and restored.metadata == {"step": restored.step}
        assert all((leaf == restored.step).all() for leaf in restored.state.values())
        assert restored.step > reached
        reached = restored.step
    assert not [record for record in caplog.records if "modicum" in record.name]
    assert len(checkpoint_steps(tmp_path)) <= 5


def test_reading_the_arrays_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    found = load_arrays(tmp_path, "trainable")
    assert found.step == 3 and found.metadata == {"losses": [0.1 * 3]}
    assert fingerprint(found.state) == fingerprint(make_state(3)["trainable"])
    assert isinstance(found.state["layers_0"]["kernel"], np.ndarray)
    assert int(load_arrays(tmp_path, step=1).state["step"]) == 1
    with pytest.raises(
        InputError, match=r"no arrays under 'train'; at the root are optimizer, step, trainable"
    ):
        load_arrays(tmp_path, "train")
    with pytest.raises(InputError, match="no checkpoint there"):
        load_arrays(tmp_path / "absent")


def test_orbax_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    Checkpoints(tmp_path).restore(abstract_of(make_state()))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_record_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    record = Record.of({"x": jnp.ones((2, 3)), "n": 1}, {"a": (1, 2), 3: "b"}, {"loss": jnp.float32(0.5)})
    path = tmp_path / "record"
    path.write_text(json.dumps(record.to_json()))
    found = Record.read(path)
    assert found.leaves == {"x": "float32[2,3]", "n": "int"} and found.values == {"n": 1}
    assert found.metadata == {"a": [1, 2], "3": "b"} and found.metrics == {"loss": 0.5}
    for text in ["[]", "3", "{}", json.dumps({**record.to_json(), "values": {"n": 2}})]:
        path.write_text(text)
        with pytest.raises(Unreadable, match="record"):
            Record.read(path)
