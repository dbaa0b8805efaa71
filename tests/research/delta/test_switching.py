"""Deltas enabled, disabled, scaled, swapped, and mixed in one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import ClassifierHead, GroupedQuery, Transformer, TransformerConfig
from modicum.models.precision import Precision
from modicum.research.delta import (
    IA3,
    OFT,
    AdaLoRA,
    Adapter,
    BitFit,
    Compacter,
    DiffPruning,
    DoRA,
    Full,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    RandomSubset,
    SoftPrompt,
    VeRA,
    apply_tasks,
    attach,
    attach_leaves,
    entry_names,
    only,
    scaled,
    stack_tasks,
    without,
)

DOUBLE = Precision("float64", "float64", "float64")
SPEC = {"attention/(query|value)": LoRA(2), "mlp/down": [Adapter(2), LoRA(3)], "classifier": Full()}


def noisy(variables, seed, scale=0.3):
    """Variables away from their neutral start, another draw for each seed."""
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return {**variables, "delta": jax.tree.unflatten(structure, moved)}


class Counted:
    """A jitted function that counts how often it was traced."""

    def __init__(self, function):
        self.traces = 0

        def traced(*args, **kwargs):
            self.traces += 1
            return function(*args, **kwargs)

        self.run = jax.jit(traced)


@pytest.fixture(scope="module", autouse=True)
def in_double_precision():
    """Two ways to compute one thing differ by rounding alone."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (6, 7), 1, 50)


@pytest.fixture(scope="module")
def case(in_double_precision, quick_compile, tokens):
    """A classifier with four entries, and three tasks."""
    config = TransformerConfig(
        layers=2, width=16, vocab=50, attention=GroupedQuery(4, 2), scan=True, precision=DOUBLE
    )
    model = Transformer(config=config, head=ClassifierHead(3))
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tuned = attach(model, SPEC)
    start = tuned.init(jax.random.key(1), params, tokens)
    return model, params, tuned, [noisy(start, seed) for seed in range(3)]


def test_names_are_enabled_and_disabled(case, tokens):
    model, params, tuned, (variables, *_) = case
    assert entry_names(variables) == {"~lora", "~lora_1", "~adapter", "~full"}
    assert entry_names(only(variables, "lora")) == {"~lora"}
    assert entry_names(only(variables, ["~lora", "full"])) == {"~lora", "~full"}
    assert entry_names(without(variables, "adapter")) == {"~lora", "~lora_1", "~full"}
    plain = model.apply(params, tokens)
    np.testing.assert_array_equal(
        tuned.apply(without(variables, entry_names(variables)), params, tokens), plain
    )
    alone = attach(model, {"classifier": Full()})
    np.testing.assert_array_equal(
        tuned.apply(only(variables, "full"), params, tokens),
        alone.apply(only(variables, "full"), params, tokens),
    )


def test_an_unknown_name_lists_the_known(case):
    variables = case[3][0]
    for function in (only, without):
        with pytest.raises(
            InputError, match="no delta is called 'bitfit'; there are ~adapter, ~full, ~lora, ~l"
        ):
            function(variables, ["lora", "bitfit"])


def test_a_factor_scales_the_effect_and_recompiles_nothing(case, tokens):
    model, params, tuned, (variables, *_) = case
    variables = only(variables, ["lora", "lora_1"])

    def weights(factor):
        changed = tuned.merge(params, scaled(tuned, variables, {"lora": factor}))
        return jax.tree.map(jnp.subtract, changed, params)["layers"]

    counted = Counted(weights)
    base, twice, none = counted.run(1.0), counted.run(-2.0), counted.run(0.0)
    assert counted.traces == 1
    query, down = (lambda t: t["attention"]["query"]["kernel"]), (lambda t: t["mlp"]["down"]["kernel"])
    np.testing.assert_allclose(query(twice), -2 * query(base), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(query(none), 0)
    assert np.abs(query(base)).max() > 0.01
    np.testing.assert_array_equal(down(twice), down(base))
    both = scaled(tuned, variables, {"lora": 0.5, "~lora_1": 3.0})
    outputs = jax.jit(tuned.apply)(both, params, tokens)
    merged = jax.jit(model.apply)(tuned.merge(params, both), tokens)
    np.testing.assert_allclose(outputs, merged, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="no delta is called 'ia3'"):
        scaled(tuned, variables, {"ia3": 2.0})
    with pytest.raises(InputError, match="Full cannot be scaled"):
        scaled(tuned, case[3][0], {"full": 2.0})


def test_swapping_tasks_compiles_once(case, tokens):
    _, params, tuned, tasks = case
    counted = Counted(lambda variables: tuned.apply(variables, params, tokens))
    outputs = [counted.run(variables) for variables in tasks]
    assert counted.traces == 1
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_a_mixed_batch_is_each_rows_own_task(case, tokens):
    model, params, tuned, tasks = case
    counted = Counted(lambda stacked, task, **kw: apply_tasks(tuned, stacked, task, params, tokens, **kw))
    stacked = stack_tasks(tasks)
    segments = (jnp.arange(7) < jnp.arange(2, 8)[:, None]).astype(jnp.int32)
    one = jax.jit(tuned.apply)
    rows = [one(variables, params, tokens, segments=segments) for variables in tasks]
    rows.append(model.apply(params, tokens, segments=segments))  # -1 is the last
    for task in ([0, 1, 2, -1, 1, 0], [2, 2, -1, -1, 0, 1]):
        wanted = jnp.stack([rows[index][row] for row, index in enumerate(task)])
        found = counted.run(stacked, jnp.array(task), segments=segments)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    counted.run(stack_tasks(tasks[::-1]), jnp.zeros(6, int), segments=segments)
    assert counted.traces == 1


def test_inputs_that_every_row_shares(case, tokens):
    """Positions `[T]` and whatever `whole` names reach each row as they are."""
    _, params, tuned, tasks = case
    positions = jnp.arange(7)[None] * 2

    stacked = stack_tasks(tasks)

    @functools.partial(jax.jit, static_argnames="whole")
    def run(positions, whole=()):
        return apply_tasks(tuned, stacked, [0] * 6, params, tokens, positions=positions, whole=whole)

    wanted = jax.jit(tuned.apply)(tasks[0], params, tokens, positions=jnp.broadcast_to(positions, (6, 7)))
    np.testing.assert_allclose(run(positions), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run(positions, whole=("positions",)), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run(jnp.repeat(positions, 6, 0)), wanted, rtol=0, atol=1e-12)


def test_leaf_deltas_of_a_function():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    tuned = attach_leaves(lambda params, x: x @ params["w"] + params["bias"], BitFit())
    tasks = [noisy(tuned.init(jax.random.key(0), params), seed) for seed in range(2)]
    x, task = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [1, -1, 0]
    found = apply_tasks(tuned, stack_tasks(tasks), task, params, x)
    wanted = [
        (tuned.apply(tasks[t], params, x) if t >= 0 else x @ params["w"] + 1)[i] for i, t in enumerate(task)
    ]
    np.testing.assert_allclose(found, jnp.stack(wanted), rtol=0, atol=1e-12)


METHOD_CASES = {
    "on kernels": {
        "attention/query": DoRA(2),
        "attention/key": IA3(),
        "attention/value": VeRA(4),
        "attention/output": OFT(4),
        "mlp/up": AdaLoRA(2),
        "layers_{1}/mlp/down": LoRA(2, initialisation="pissa"),
    },
    "elsewhere": {
        "attention": Prefix(3),
        "attention/output": Compacter(n=2, reduction=4),
        "mlp": ParallelAdapter(2),
        "final_norm": LayerNormTuning(),
        "layers_{0}/mlp": RandomSubset(0.1),
    },
}


@pytest.mark.parametrize("name", METHOD_CASES)
def test_every_method_mixes_and_can_be_left_out(case, tokens, name):
    """Also at the layers of a stack that the address leaves out, and away from the start."""
    model, params, *_ = case
    tuned = attach(model, METHOD_CASES[name])
    start = tuned.init(jax.random.key(1), params, tokens)
    tasks = [noisy(start, seed, 0.1) for seed in (1, 2)]
    mixed = jax.jit(lambda stacked, task: apply_tasks(tuned, stacked, task, params, tokens))
    found = mixed(stack_tasks(tasks), jnp.array([0, 1, -1, 1, -1, 0]))
    one = jax.jit(tuned.apply)
    first, second = (one(task, params, tokens) for task in tasks)
    plain = jax.jit(model.apply)(params, tokens)
    wanted = jnp.stack([first[0], second[1], plain[2], second[3], plain[4], first[5]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert np.abs(first - plain).max() > 1e-6 and np.abs(first - second).max() > 1e-6


def test_a_soft_prompt_has_no_backbone_rows():
    config = TransformerConfig(layers=1, width=16, vocab=50, attention=GroupedQuery(4), precision=DOUBLE)
    model, tokens = Transformer(config), jnp.array([[3, 4, 5], [6, 7, 8]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tuned = attach(model, SoftPrompt(2))
    start = tuned.init(jax.random.key(1), params, tokens)
    tasks = [noisy(start, seed) for seed in (1, 2)]
    stacked = stack_tasks(tasks)
    mixed = jax.jit(lambda stacked, task: apply_tasks(tuned, stacked, task, params, tokens))
    found = mixed(stacked, jnp.array([1, -1]))
    np.testing.assert_allclose(found[0], tuned.apply(tasks[1], params, tokens)[0], rtol=0, atol=1e-12)
    assert np.isnan(found[1]).all()
    with pytest.raises(
        InputError, match="task -1 of a row is the backbone, but SoftPrompt cannot be switched off"
    ):
        apply_tasks(tuned, stacked, [1, -1], params, tokens)


def test_gradients_reach_each_rows_task_alone(case, tokens):
    _, params, tuned, tasks = case
    stacked = stack_tasks(tasks)

    def loss(delta):
        mixed = {**stacked, "delta": delta}
        return apply_tasks(tuned, mixed, jnp.array([0, 0, 2, -1, -1, 2]), params, tokens).sum()

    gradient = jax.jit(jax.grad(loss))(stacked["delta"])
    norms = np.stack([jnp.abs(leaf).reshape(3, -1).sum(1) for leaf in jax.tree.leaves(gradient)])
    assert (norms[:, 1] == 0).all() and (norms[:, [0, 2]] > 0).all()


def test_a_task_that_is_not_there(case, tokens):
    _, params, tuned, tasks = case
    stacked = stack_tasks(tasks)
    with pytest.raises(InputError, match="task 3 of a row; there are 0-2, and -1 for the backbone"):
        apply_tasks(tuned, stacked, [0, 1, 2, 3, 0, 0], params, tokens)
    with pytest.raises(InputError, match=r"task is float64 \(6,\); one integer for each of 6 rows"):
        apply_tasks(tuned, stacked, np.zeros(6), params, tokens)
    traced = jax.jit(lambda task: apply_tasks(tuned, stacked, task, params, tokens))
    wrong = np.isnan(traced(jnp.array([3, -2, 0, -1, 1, 2]))).all(1)
    assert wrong.tolist() == [True, True, False, False, False, False]


def test_tasks_of_unlike_shapes_do_not_stack(case):
    first, second, _ = case[3]
    with pytest.raises(InputError, match=r"task 1: delta/.*~adapter.* is absent, in task 0 it is float64"):
        stack_tasks([first, without(second, "adapter")])
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), second)
    with pytest.raises(InputError, match=r"task 1: .* is float32\[.*in task 0 it is float64\["):
        stack_tasks([first, single])
    with pytest.raises(InputError, match="no task"):
        stack_tasks([])


def test_tasks_without_variables_are_an_error(case, tokens):
    _, params, tuned, (variables, *_) = case
    nothing = without(variables, entry_names(variables))
    with pytest.raises(InputError, match="the tasks have no variables"):
        apply_tasks(tuned, stack_tasks([nothing]), [0] * 6, params, tokens)


def test_gates_are_drawn_for_each_row_where_it_trains():
    params = {"kernel": jnp.ones((4, 3))}
    tuned = attach_leaves(lambda params, x: x @ params["kernel"], {"": DiffPruning(start=0.0)})
    start = tuned.init(jax.random.key(0), params)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, start["delta"])
    stacked, rows = stack_tasks([{**start, "delta": moved}]), jnp.ones((3, 4))
    drawn = apply_tasks(tuned, stacked, [0, 0, -1], params, rows, rng=jax.random.key(1), train=True)
    plain = apply_tasks(tuned, stacked, [0, 0, -1], params, rows)
    assert jnp.abs(drawn[0] - drawn[1]).max() > 1e-3 and jnp.abs(drawn[0] - plain[0]).max() > 1e-3
    np.testing.assert_array_equal(plain[0], plain[1])
    np.testing.assert_array_equal(drawn[2], rows[2] @ params["kernel"])
    with pytest.raises(InputError, match=r"DiffPruning draws at random: .* needs rng="):
        apply_tasks(tuned, stacked, [0, 0, 0], params, rows, train=True)
