"""Every known trap of attaching deltas, and the test that would fall into it.

The traps are those of the research notes: what `nn.intercept_methods`, NNX and weight-space deltas get wrong
unless care is taken, and what users of other libraries reported. `COVERED` says where each is tested; those
without a test elsewhere are tested here.
"""

import ast
import dataclasses
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import (
    METHODS,
    Adapter,
    BitFit,
    Full,
    LayerNormTuning,
    LoRA,
    attach,
    load_delta,
    save_delta,
)

COVERED = {
    # delta.md section 0.5, a-d
    "a delta that is a Flax module adopts the site's submodules": "test_traps::test_methods_are_no_modules",
    "a site's submodules keep their paths": "test_traps::test_submodules_of_a_site_stay_where_they_are",
    "an interceptor around a program": "test_sites::test_nothing_leaks_into_or_out_of_compiled_programs",
    "a function that was compiled before": "test_traps::test_a_program_compiled_before_gets_the_delta",
    "a delta shared by a scan's layers": "test_sites::test_scanned_and_unrolled_layers_are_one_model",
    "gradients through a scan in an NNX model": "test_nnx::test_scanned_layers_are_the_unrolled_ones",
    "a key that stays in a compiled function": "test_traps::test_a_key_does_not_stay_in_a_compiled_function",
    # section 3.2
    "threads": "test_traps::test_threads_do_not_see_each_others_deltas",
    "interceptors of the user": "test_traps::test_interceptors_of_the_user_still_run",
    "methods beside __call__": "test_traps::test_only_the_call_is_a_site",
    "an embedding's attend": "test_traps::test_attend_of_an_embedding_is_left_alone",
    "raw parameters are no sites": "test_traps::test_raw_parameters_are_no_sites_but_leaves",
    "setup": "test_sites::test_several_methods_stack_on_one_site_in_order",
    "shared modules": "test_sites::test_starts_bit_identical_and_merges_exactly",
    "a subclass that calls its parent": "test_sites::test_a_subclass_that_calls_its_parent_is_one_site",
    "nn.jit": "test_sites::test_nothing_leaks_into_or_out_of_compiled_programs",
    "scan, remat, vmap": "test_sites::test_gradients_equal_those_through_the_merged_weights",
    "layers stacked on another axis": "test_traps::test_layers_stacked_on_another_axis_are_refused",
    "a range under scan": "test_every_method::test_a_layer_range_of_a_scan_is_that_of_the_unrolled_model",
    "DenseGeneral with several axes": "test_sites::test_starts_bit_identical_and_merges_exactly",
    "MultiHeadDotProductAttention": "test_sites::test_flax_attention",
    "masks of Flax's attention": "test_flax_prefix::test_flax_attention",
    "state beside parameters": "test_traps::test_models_with_other_state_are_refused_by_name",
    "state beside parameters, NNX": "test_nnx::test_what_cannot_be_is_an_error",
    "dropout that repeats by layer": "test_sites::test_dropout_draws_anew_for_each_layer_and_key",
    "NNX: the user's model changed": "test_nnx::test_the_users_model_is_not_touched",
    "NNX: paths renamed": "test_nnx::test_paths_are_those_of_the_model",
    "NNX: a function compiled inside": "test_nnx::test_a_function_compiled_inside_the_model_is_found_again",
    "NNX: a method that acts through Linen": "test_nnx::test_a_soft_prompt",
    # section 3.3
    "an offset lost in bfloat16": "test_leaves::test_bitfit_learns_below_the_steps_of_a_bfloat16_bias",
    "a delta lost in merging": "test_merging::test_lost_bits_are_an_error_that_says_how_many",
    "a delta beside a bfloat16 kernel": "test_traps::test_a_small_delta_survives_beside_a_bfloat16_kernel",
    "the backbone's gradients": "test_transformer::test_the_backbones_gradients_are_never_made",
    "recompiling on a swap": "test_sites::test_swapping_deltas_recompiles_nothing",
    # section 1.1 and 1.3: OpenDelta's defects and reports
    "attach after detach": "test_traps::test_attaching_again_after_detaching",
    "the reloaded model scores worse": "test_traps::test_a_reloaded_model_scores_as_before",
    "exclusions that a method ignores": "test_traps::test_exclusions_hold_for_every_kind_of_method",
    "a specification that matches nothing": "test_sites::test_bad_specifications_say_what_is_wrong",
    "a delta whose module is not called": "test_sites::test_a_delta_whose_module_is_not_called_is_an_error",
    "init that needs a forward pass": "test_sites::test_init_computes_nothing_of_the_backbone",
    "names with slashes, lists": "test_leaves::test_trees_of_other_libraries",
}


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("trap", COVERED)
def test_the_test_for_each_trap_is_there(trap):
    file, name = COVERED[trap].split("::")
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


D = 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)


def params_of(model, *args):
    return model.init(jax.random.key(0), *(args or (X,)))["params"]


def moved(variables, scale=0.3):
    rng = np.random.default_rng(3)
    delta = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), variables["delta"]
    )
    return {**variables, "delta": delta}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(D, name="out")(nn.relu(nn.Dense(2 * D, name="up")(nn.LayerNorm(name="norm")(x))))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return x


def test_methods_are_no_modules():
    """A Flax module that called the site would become the parent of the site's submodules."""
    for method in METHODS.values():
        assert not issubclass(method, nn.Module)
        assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen


def test_submodules_of_a_site_stay_where_they_are():
    """Around a module that makes submodules while it is called: their parameters are found at their paths."""
    model = Model()
    params = params_of(model)
    tuned = attach(model, {"layers_0": Adapter(2), "": Adapter(2)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    assert set(variables["delta"]) == {"layers_0", "~adapter_1"}
    seen = []

    def look(call, args, kwargs, context):
        seen.append("/".join(context.module.scope.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        tuned.apply(variables, params, X)
    below = [f"layers_{i}{part}" for i in (0, 1) for part in ("", "/norm", "/up", "/out")]
    assert sorted(set(seen)) == sorted(["", *below])


def test_a_program_compiled_before_gets_the_delta():
    """The compiled functions inside the model have run without a delta, and with another one."""

    class Compiled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(Block)(name="block")(x)

    model = Compiled()
    params = params_of(model)
    base = model.apply({"params": params}, X)
    outputs = [base]
    for alpha in (16.0, 32.0):
        tuned = attach(model, {"out": LoRA(2, alpha=alpha)})
        outputs.append(tuned.apply(moved(tuned.init(jax.random.key(1), params, X)), params, X))
    np.testing.assert_array_equal(model.apply({"params": params}, X), base)
    for i in range(3):
        for j in range(i):
            assert jnp.abs(outputs[i] - outputs[j]).max() > 0.05


def test_a_key_does_not_stay_in_a_compiled_function():
    """Dropout of a delta inside `nn.jit`: another trace draws with its own key, and none leaks."""

    class Compiled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(Block)(name="block")(x)

    model = Compiled()
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2, dropout=0.5)})
    variables = moved(tuned.init(jax.random.key(1), params, X))

    def run(key):
        return tuned.apply(variables, params, X, rng=key, train=True)

    one, two = (jax.jit(lambda key, f=factor: f * run(key)) for factor in (1.0, 2.0))
    keys = jax.random.key(1), jax.random.key(2)
    np.testing.assert_allclose(two(keys[0]), 2 * one(keys[0]), rtol=1e-5)
    np.testing.assert_allclose(run(keys[1]), one(keys[1]), rtol=1e-4, atol=1e-5)
    assert jnp.abs(one(keys[0]) - one(keys[1])).max() > 0.01


def test_threads_do_not_see_each_others_deltas():
    """Three threads trace at once: two deltas and the plain model."""
    model = Model()
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2)})
    tasks = [moved(tuned.init(jax.random.key(1), params, X), scale) for scale in (0.2, 0.6)]
    calls = [lambda: model.apply({"params": params}, X)]
    calls += [lambda task=task: tuned.apply(task, params, X) for task in tasks]
    wanted, got, barrier = [call() for call in calls], [None] * 3, threading.Barrier(3)

    def work(i):
        barrier.wait()
        got[i] = [calls[i]() for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, one in zip(got, wanted):
        for output in outputs:
            np.testing.assert_array_equal(output, one)
    assert jnp.abs(wanted[1] - wanted[2]).max() > 0.05


def test_interceptors_of_the_user_still_run():
    """The user's, entered first, is outermost: it sees the site's output with the delta in it."""
    model = Model()
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    seen = {}

    def double(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.module.name == "out" and context.method_name == "__call__":
            seen["/".join(context.module.scope.path)] = output
            return 2 * output
        return output

    with nn.intercept_methods(double):
        doubled = tuned.apply(variables, params, X)
        plain = model.apply({"params": tuned.merge(params, variables)}, X)
    assert set(seen) == {"layers_0/out", "layers_1/out"}
    np.testing.assert_allclose(doubled, plain, rtol=1e-5, atol=1e-5)
    assert jnp.abs(doubled - tuned.apply(variables, params, X)).max() > 0.05


class Helped(nn.Module):
    """Calls a method of its own, and has a `setup`: the interceptor is asked about all of them."""

    def setup(self):
        self.dense = nn.Dense(D)

    def twice(self, x):
        return 2 * self.dense(x)

    def __call__(self, x):
        return self.twice(x) + 1


def test_only_the_call_is_a_site():
    model = Helped()
    params = params_of(model)
    tuned = attach(model, {"": Adapter(2)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    delta = variables["delta"]["~adapter"]
    y = model.apply({"params": params}, X)
    hidden = jax.nn.gelu(y @ delta["down_kernel"] + delta["down_bias"])
    wanted = y + hidden @ delta["up_kernel"] + delta["up_bias"]
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """Embeds and, with the same matrix, reads out."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, D, name="embed")
        return embed.attend(jnp.tanh(embed(tokens)))


def test_attend_of_an_embedding_is_left_alone():
    """A delta at the embedding changes what is looked up, and not the logits' matrix."""
    model, tokens = Tied(), jnp.arange(6).reshape(2, 3)
    params = params_of(model, tokens)
    tuned = attach(model, {"embed": Adapter(2)})
    variables = moved(tuned.init(jax.random.key(1), params, tokens))
    delta, table = variables["delta"]["embed"]["~adapter"], params["embed"]["embedding"]
    y = table[tokens]
    hidden = jax.nn.gelu(y @ delta["down_kernel"] + delta["down_bias"])
    y = y + hidden @ delta["up_kernel"] + delta["up_bias"]
    np.testing.assert_allclose(
        tuned.apply(variables, params, tokens), jnp.tanh(y) @ table.T, rtol=1e-5, atol=1e-5
    )


class Raw(nn.Module):
    """Multiplies by a parameter of its own, as experts and fused projections do."""

    @nn.compact
    def __call__(self, x):
        w = self.param("experts", nn.initializers.lecun_normal(), (D, D))
        return x @ w


def test_raw_parameters_are_no_sites_but_leaves():
    model = Raw()
    params = params_of(model)
    with pytest.raises(InputError, match="'experts' names no module"):
        attach(model, {"experts": LoRA(2)}).init(jax.random.key(1), params, X)
    with pytest.raises(InputError, match="the root module: LoRA needs a module that multiplies"):
        attach(model, {"": LoRA(2)}).init(jax.random.key(1), params, X)
    tuned = attach(model, {"experts": Full()})
    variables = moved(tuned.init(jax.random.key(1), params))
    wanted = X @ variables["delta"]["experts"]["~full"]["value"]
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, rtol=1e-5, atol=1e-5)


def test_layers_stacked_on_another_axis_are_refused():
    class Carry(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="dense")(x), None

    class Sideways(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Carry, variable_axes={"params": -1}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x)[0]

    model = Sideways()
    with pytest.raises(InputError, match="only a leading axis is supported"):
        attach(model, {"dense": LoRA(2)}).init(jax.random.key(1), params_of(model), X)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(D, name="up")(x))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.zeros(()))
        return nn.Dense(D, name="up")(x) + count.value


@pytest.mark.parametrize(
    ("model", "collection"), [(Normalised(), "batch_stats"), (Counting(), "counts")], ids=["norm", "own"]
)
def test_models_with_other_state_are_refused_by_name(model, collection):
    params = params_of(model)
    wanted = f"{type(model).__name__} keeps a collection '{collection}' beside its params"
    with pytest.raises(InputError, match=wanted) as caught:
        attach(model, {"up": LoRA(2)}).init(jax.random.key(1), params, X)
    assert "\n" not in str(caught.value)
    leaf = attach(model, {"up": BitFit()})
    with pytest.raises(InputError, match=wanted):
        leaf.apply(leaf.init(jax.random.key(1), params), params, X)


def test_a_small_delta_survives_beside_a_bfloat16_kernel():
    """A change of 1e-3 of the kernel's size, computed beside it in float32, is kept; merged, it is not."""
    model, x = nn.Dense(64, dtype=jnp.float32), jax.random.normal(jax.random.key(2), (4, 64))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(model, x))
    tuned = attach(model, {"": LoRA(2)})
    variables = moved(tuned.init(jax.random.key(1), params, x), 3e-4)
    delta = variables["delta"]["~lora"]
    change = (x @ delta["a"] @ delta["b"]) * 8.0
    base = model.apply({"params": params}, x)
    beside = tuned.apply(variables, params, x) - base
    merged = model.apply({"params": tuned.merge(params, variables)}, x) - base

    def error(found):
        return float(jnp.linalg.norm(found - change) / jnp.linalg.norm(change))

    assert error(beside) < 0.01 < 0.3 < error(merged)


def test_attaching_again_after_detaching():
    """Nothing is attached to the model itself: plain, tuned, plain, tuned by another, tuned as before."""
    model = Model()
    params = params_of(model)
    base = model.apply({"params": params}, X)
    first, second = attach(model, {"out": LoRA(2)}), attach(model, {"out": [Adapter(2), LoRA(3)]})
    one, two = (moved(tuned.init(jax.random.key(1), params, X)) for tuned in (first, second))
    before = first.apply(one, params, X)
    np.testing.assert_array_equal(model.apply({"params": params}, X), base)
    assert jnp.abs(second.apply(two, params, X) - before).max() > 0.05
    np.testing.assert_array_equal(attach(model, {"out": LoRA(2)}).apply(one, params, X), before)
    np.testing.assert_array_equal(model.apply({"params": params}, X), base)


def test_a_reloaded_model_scores_as_before(tmp_path):
    """Trained, stored, and loaded onto a backbone made anew: the same score to the last bit."""
    model = Model()
    params = params_of(model)
    tuned = attach(
        model, {"(up|out)": LoRA(2, dropout=0.1), "": LayerNormTuning(), "layers_1/up/bias": Full()}
    )
    variables = tuned.init(jax.random.key(1), params, X)
    target = jnp.sin(3 * X)

    def score(tuned, variables, params):
        return jnp.square(tuned.apply(variables, params, X) - target).mean()

    @jax.jit
    def step(delta, key):
        def loss(delta):
            y = tuned.apply({**variables, "delta": delta}, params, X, rng=key, train=True)
            return jnp.square(y - target).mean()

        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, delta, jax.grad(loss)(delta))

    delta = variables["delta"]
    for key in jax.random.split(jax.random.key(2), 30):
        delta = step(delta, key)
    trained = {**variables, "delta": delta}
    after = score(tuned, trained, params)
    assert after < 0.8 * score(tuned, variables, params)
    save_delta(tmp_path, tuned, trained, params)
    same = params_of(Model())
    again, found = load_delta(tmp_path, Model(), same)
    assert score(again, found, same) == after


@pytest.mark.parametrize("method", [LoRA(2), Adapter(2), Full(), BitFit()], ids=lambda each: each.name)
def test_exclusions_hold_for_every_kind_of_method(method):
    model = Model()
    params = params_of(model)
    tuned = attach(model, {"(up|out)": method}, exclude=["layers_1", "layers_0/out"])
    delta = tuned.init(jax.random.key(1), params, X)["delta"]
    assert set(delta) == {"layers_0"} and set(delta["layers_0"]) == {"up"}
