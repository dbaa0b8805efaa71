"""Optimizers and schedules: values at the steps that matter, decay where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.models import stack_layers
from modicum.research.training.config import OptimizerConfig, ScheduleConfig
from modicum.research.training.optimizers import OPTIMIZERS, decayed, make_optimizer, make_schedule
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

CONSTANT = ScheduleConfig("constant", warmup=0)


def rates(config, steps, peak=1.0):
    schedule = make_schedule(config, peak, steps)
    return [float(schedule(jnp.asarray(step))) for step in range(steps + 1)]


def test_constant_after_warmup():
    assert rates(ScheduleConfig("constant", warmup=4), 8) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_cosine_falls_from_the_peak_to_its_final_share():
    values = rates(ScheduleConfig("cosine", warmup=2, final=0.1), 12, peak=3.0)
    assert values[0] == 0 and values[1] == 1.5 and values[2] == 3
    np.testing.assert_allclose(values[7], 3 * 0.55, rtol=1e-6)  # half way: the mean of 1 and 0.1
    np.testing.assert_allclose(values[12], 0.3, rtol=1e-6)
    expected = [3 * (0.1 + 0.9 * (1 + np.cos(np.pi * t / 10)) / 2) for t in range(11)]
    np.testing.assert_allclose(values[2:], expected, rtol=1e-5)


def test_linear_falls_evenly():
    values = rates(ScheduleConfig("linear", warmup=0, final=0.5), 10)
    np.testing.assert_allclose(values, np.linspace(1, 0.5, 11), rtol=1e-6)


def test_rsqrt_halves_when_the_step_is_four_times_the_warmup():
    values = rates(ScheduleConfig("rsqrt", warmup=5), 80)
    np.testing.assert_allclose([values[5], values[20], values[80]], [1, 0.5, 0.25], rtol=1e-6)


def test_wsd_is_stable_and_then_falls():
    values = rates(ScheduleConfig("wsd", warmup=10, final=0.0, decay=0.2), 60)
    assert values[10:51] == [1.0] * 41  # the last fifth of the 50 steps after the warmup
    np.testing.assert_allclose([values[55], values[60]], [0.5, 0], atol=1e-6)


def test_a_warmup_below_one_is_a_share_of_the_steps():
    assert rates(ScheduleConfig("constant", warmup=0.25), 8) == [0, 0.5, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "config, message",
    [
        (OptimizerConfig("adam"), "optimizer 'adam' is unknown; valid: adamw, adafactor, lion, muon, sgd"),
        (OptimizerConfig(schedule=ScheduleConfig("cosin")), "schedule 'cosin' is unknown; valid: constant"),
        (OptimizerConfig(schedule=ScheduleConfig(warmup=10)), "warmup of 10 steps leaves none of the 10"),
    ],
)
def test_bad_names_and_warmups_are_errors(config, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(config, 10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_rule(name, tiny):
    model = tiny.TinyModel(dropout=0.0)
    rate = {"sgd": 0.3, "lion": 0.01}.get(name, 0.03)
    optimizer = make_optimizer(OptimizerConfig(name, rate, CONSTANT, weight_decay=0.01), 80)
    step = make_train_step(tiny.loss_of(model), optimizer)
    batches = jax.tree.map(lambda *rows: np.stack(rows), *[tiny.batch_of(index) for index in range(80)])

    @jax.jit
    def run(state):
        def body(state, batch):
            state, metrics = step(state, {}, batch)
            return state, metrics["loss"]

        return jax.lax.scan(body, state, batches)

    _, losses = run(create_state(model.init(jax.random.key(0)), optimizer))
    assert losses[:5].mean() > 2.0  # log(13) is 2.56
    assert losses[-5:].mean() < 0.6


PARAMS = {
    "embedding": {"table": np.full((4, 3), 2.0, np.float32)},
    **{
        f"layers_{i}": {
            "up": {"kernel": np.full((3, 5), 2.0, np.float32), "bias": np.full(5, 2.0, np.float32)},
            "norm": {"scale": np.full(3, 2.0, np.float32)},
        }
        for i in range(2)
    },
    "head": {"kernel": np.full((3, 4), 2.0, np.float32)},
}


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_takes_its_share_of_matrices_and_nothing_of_vectors(name, stacked):
    """Without a gradient a step multiplies a matrix by 1 - rate * decay, whatever the optimizer."""
    params = stack_layers(PARAMS) if stacked else PARAMS
    optimizer = make_optimizer(OptimizerConfig(name, 0.1, CONSTANT, weight_decay=0.5), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)

    def check(path, leaf):
        is_matrix = path[-1].key in ("kernel", "table")
        np.testing.assert_allclose(leaf, 2.0 * (1 - 0.1 * 0.5) if is_matrix else 2.0, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, new)


def test_the_decay_mask_of_a_delta_looks_at_the_deltas_own_leaves():
    delta = {
        "layers_0": {"query": {"~lora": {"a": np.ones((8, 2)), "b": np.ones((2, 8))}}, "bias": np.ones(3)}
    }
    assert decayed(delta) == {"layers_0": {"query": {"~lora": {"a": True, "b": True}}, "bias": False}}
    stacked = {"layers": {"bias": np.ones((4, 3)), "a": np.ones((4, 8, 2))}}
    assert decayed(stacked) == {"layers": {"bias": False, "a": True}}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_scanned_parameters_are_updated_as_unrolled_ones(name):
    """Adafactor is left out: it clips by the root mean square of a leaf, and a stack is one leaf."""
    numbers = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: numbers.normal(size=leaf.shape).astype(np.float32), PARAMS)
    optimizer = make_optimizer(OptimizerConfig(name, 0.1, CONSTANT, weight_decay=0.5), 10)

    def update(params, gradients):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    unrolled, scanned = update(PARAMS, gradients), update(stack_layers(PARAMS), stack_layers(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stack_layers(unrolled), scanned
    )


def test_muon_orthogonalises_inner_kernels_and_leaves_the_rest_to_adam():
    numbers = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: numbers.normal(size=leaf.shape).astype(np.float32), PARAMS)
    optimizer = make_optimizer(OptimizerConfig("muon", 1.0, CONSTANT, clip=0.0), 10)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    singular = np.linalg.svd(updates["layers_0"]["up"]["kernel"], compute_uv=False)
    # five Newton-Schulz steps bring every singular value into about (0.7, 1.2) of 0.2 sqrt(5)
    np.testing.assert_allclose(singular / (0.2 * np.sqrt(5)), 1, atol=0.35)
    for leaf in (updates["head"]["kernel"], updates["embedding"]["table"], updates["layers_0"]["up"]["bias"]):
        np.testing.assert_allclose(np.abs(leaf), np.abs(leaf).mean(), rtol=1e-3)  # Adam's first step


def test_muon_trains_a_delta_without_kernels():
    delta = {"query": {"~lora": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}}
    optimizer = make_optimizer(OptimizerConfig("muon", 0.1, CONSTANT), 10)
    updates, _ = optimizer.update(delta, optimizer.init(delta), delta)
    assert all((leaf < 0).all() for leaf in jax.tree.leaves(updates))


def test_clipping_bounds_the_norm_of_all_gradients_together():
    gradients = {"a": jnp.full(3, 4.0), "b": jnp.full((2, 2), 5.0)}
    plain = OptimizerConfig("sgd", 1.0, CONSTANT, beta1=0.0, clip=0.0)
    clipped = OptimizerConfig("sgd", 1.0, CONSTANT, beta1=0.0, clip=1.0)

    def update(config, gradients):
        optimizer = make_optimizer(config, 10)
        return optimizer.update(gradients, optimizer.init(gradients), gradients)[0]

    norm = float(optax.tree.norm(gradients))
    jax.tree.map(
        np.testing.assert_array_equal, update(plain, gradients), jax.tree.map(jnp.negative, gradients)
    )
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, -old / norm, rtol=1e-6),
        update(clipped, gradients),
        gradients,
    )
    small = jax.tree.map(lambda leaf: leaf / 100, gradients)
    jax.tree.map(np.testing.assert_array_equal, update(clipped, small), update(plain, small))
