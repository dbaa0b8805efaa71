"""The train step: hand-computed losses and updates, accumulation, averaging, float16's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.research.training.loss_scale import Scaling
from modicum.research.training.objectives import LossSums
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")


def run_step(loss, optimizer, params, batch, frozen=None, state=None, **options):
    averaged = options.get("average_decay", 0) > 0
    state = state or create_state(
        params, optimizer, scaling=options.get("scaling", Scaling()), averaged=averaged
    )
    return jax.jit(make_train_step(loss, optimizer, **options))(state, frozen or {}, batch)


def test_loss_update_and_norms_by_hand(x64):
    """A linear regression, whose gradient is 2 Xᵀ(Xw - y) over the summed weight."""
    numbers = np.random.default_rng(0)
    x, y, weight = numbers.normal(size=(4, 3)), numbers.normal(size=4), np.asarray([1.0, 0.5, 0.0, 2.0])
    w = numbers.normal(size=3)

    def loss(trainable, frozen, batch, rng):
        error = batch["x"] @ trainable["w"] - batch["y"]
        total = (batch["weight"] * error**2).sum()
        return LossSums(total, batch["weight"].sum(), {"bias": (batch["weight"] * error).sum()})

    state, metrics = run_step(loss, optax.sgd(0.1), {"w": w}, {"x": x, "y": y, "weight": weight})
    error = x @ w - y
    gradient = 2 * x.T @ (weight * error) / weight.sum()
    np.testing.assert_allclose(metrics["loss"], (weight * error**2).sum() / 3.5, rtol=1e-12)
    np.testing.assert_allclose(metrics["bias"], (weight * error).sum() / 3.5, rtol=1e-12)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-12)
    np.testing.assert_allclose(metrics["update_norm"], 0.1 * np.linalg.norm(gradient), rtol=1e-12)
    np.testing.assert_allclose(state.trainable["w"], w - 0.1 * gradient, rtol=1e-12)
    assert metrics["weight"] == 3.5 and metrics["finite"] and state.step == 1


def test_parts_of_a_batch_give_the_update_of_the_whole(tiny, x64):
    """Rows weigh by their tokens, so that parts of uneven weight do not count alike."""
    model = tiny.TinyModel(dropout=0.0)
    params, batch = model.init(jax.random.key(0), jnp.float64), tiny.batch_of(0)
    batch["weights"] = np.float64([[1, 1, 1, 1, 1, 1], [0] * 6, [1, 0, 0, 0, 0, 0], [0.5, 2, 0, 0, 0, 0]])
    optimizer = optax.adam(0.01)
    (whole, sums), *parts = (
        run_step(tiny.loss_of(model), optimizer, params, batch, accumulate=count) for count in (1, 2, 4)
    )
    for state, metrics in parts:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, whole)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), metrics, sums)
    logits = np.asarray(model.apply(params, batch["tokens"]))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - chosen
    np.testing.assert_allclose(
        sums["loss"], (nats * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-12
    )


def test_rows_that_do_not_divide_into_parts_are_an_error(tiny):
    model = tiny.TinyModel()
    with pytest.raises(InputError, match="a batch of 4 rows does not divide into 3 parts"):
        run_step(
            tiny.loss_of(model), optax.sgd(0.1), model.init(jax.random.key(0)), tiny.batch_of(0), accumulate=3
        )


def test_a_batch_without_weight_changes_nothing(tiny):
    model = tiny.TinyModel()
    params, batch = model.init(jax.random.key(0)), tiny.batch_of(0)
    batch["weights"] = np.zeros_like(batch["weights"])
    state, metrics = run_step(tiny.loss_of(model), optax.sgd(0.1), params, batch)
    assert metrics["loss"] == 0 and metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, params)


def test_randomness_is_a_function_of_seed_step_and_part():
    def draws(trainable, frozen, batch, rng):
        """A "loss" whose gradient is the number drawn."""
        drawn = jax.random.uniform(rng)
        return LossSums(trainable["w"] * drawn, jnp.ones(()), {"drawn": drawn})

    optimizer, batch = optax.sgd(0.0), {"x": np.zeros((2, 1))}

    def drawn(seed, step, accumulate=1):
        state = create_state({"w": jnp.ones(())}, optimizer, seed=seed).replace(step=jnp.asarray(step))
        run = jax.jit(make_train_step(draws, optimizer, accumulate=accumulate))
        return float(run(state, {}, batch)[1]["drawn"])

    assert drawn(0, 3) == drawn(0, 3)
    assert len({drawn(0, 3), drawn(0, 4), drawn(1, 3)}) == 3
    state = create_state({"w": jnp.ones(())}, optimizer)
    key = jax.random.fold_in(jax.random.key(state.seed), 0)
    parts = [float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(2)]
    assert parts[0] != parts[1]
    assert drawn(0, 0, accumulate=2) == pytest.approx(sum(parts) / 2)


def test_the_average_follows_by_its_decay(tiny):
    model = tiny.TinyModel(dropout=0.0)
    optimizer, params = optax.sgd(0.5), model.init(jax.random.key(0))
    step = jax.jit(make_train_step(tiny.loss_of(model), optimizer, average_decay=0.9), donate_argnums=0)
    state = create_state(jax.tree.map(jnp.copy, params), optimizer, averaged=True)
    expected = params
    for index in range(3):
        state, _ = step(state, {}, tiny.batch_of(index))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, state.trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.average, expected)
    assert state.evaluated is state.average
    without = create_state(params, optimizer)
    assert without.evaluated is without.trainable and jax.tree.leaves(without.average) == []


def test_frozen_arrays_have_no_gradient_and_may_be_integers():
    def loss(trainable, frozen, batch, rng):
        total = (trainable["w"] * frozen["scale"][frozen["index"]] * batch["x"]).sum()
        return LossSums(total, jnp.ones(()), {})

    frozen = {"scale": jnp.asarray([2.0, 3.0]), "index": jnp.asarray(1)}
    state, _ = run_step(loss, optax.sgd(1.0), {"w": jnp.ones(())}, {"x": np.ones((2,), np.float32)}, frozen)
    assert state.trainable == {"w": -5.0}


def times(trainable, frozen, batch, rng):
    """A loss whose gradient is the batch: infinite where the batch is."""
    return LossSums((trainable["w"] * batch["x"]).sum(), jnp.ones(()), {})


def test_an_overflowing_step_changes_only_the_scale_and_is_counted():
    scaling = Scaling(initial=8.0, growth_interval=2, largest=32.0)
    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(times, optimizer, scaling=scaling, average_decay=0.5))
    state = create_state({"w": jnp.ones(())}, optimizer, scaling=scaling, averaged=True)
    good, bad = {"x": np.ones(1, np.float32)}, {"x": np.full(1, np.inf, np.float32)}

    state, metrics = step(state, {}, good)
    before = state
    state, metrics = step(state, {}, bad)
    assert not metrics["finite"]
    assert (metrics["loss_scale"], metrics["skipped_steps"]) == (4.0, 1)
    for name in ("trainable", "optimizer", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    assert state.step == 2  # the batch is gone; the step after takes the next one

    scales = []
    for batch in (good, good, good, good, bad, good, good, good, good, good, good):
        state, metrics = step(state, {}, batch)
        scales.append(float(metrics["loss_scale"]))
    # doubled after two good steps, halved by the bad one, never above the largest
    assert scales == [4, 8, 8, 16, 8, 8, 16, 16, 32, 32, 32]
    assert state.scale.skipped == 2
    assert jnp.isfinite(state.trainable["w"]) and state.trainable["w"] < before.trainable["w"]


def test_the_scale_does_not_fall_below_one():
    scaling = Scaling(initial=2.0, growth_interval=10)
    state, bad = scaling.init(), jnp.asarray(False)
    for expected in (1.0, 1.0):
        state = scaling.update(state, bad)
        assert state.value == expected
    assert state.skipped == 2


def test_the_scale_does_not_show_in_the_update(tiny, x64):
    model = tiny.TinyModel()
    params, batch = model.init(jax.random.key(0), jnp.float64), tiny.batch_of(0)
    updates = [
        run_step(tiny.loss_of(model), optax.sgd(0.1), params, batch, scaling=scaling)[0].trainable
        for scaling in (Scaling(), Scaling(2.0**15, 2000))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), *updates)


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """What flows back through the cast is 1e-9, below float16's smallest number, 6e-8."""

    def loss(trainable, frozen, batch, rng):
        half = trainable["w"].astype(jnp.float16) * batch["x"].astype(jnp.float16)
        return LossSums(half.astype(jnp.float32).sum() * 1e-9, jnp.ones(()), {})

    batch = {"x": np.ones(1, np.float32)}
    lost, _ = run_step(loss, optax.sgd(1e9), {"w": jnp.ones(())}, batch)
    kept, _ = run_step(loss, optax.sgd(1e9), {"w": jnp.ones(())}, batch, scaling=Scaling(2.0**15, 2000))
    assert lost.trainable["w"] == 1.0
    np.testing.assert_allclose(kept.trainable["w"], 0.0, atol=1e-3)
