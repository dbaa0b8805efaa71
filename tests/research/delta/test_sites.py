"""Site deltas on models that know nothing of deltas: every way Linen has of making and lifting modules."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.models.products import project
from modicum.research.delta import Adapter, LoRA, Site, SiteMethod, attach

D, LAYERS = 8, 3
X = jax.random.normal(jax.random.key(7), (2, 5, D))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(D, name="out")(nn.relu(nn.Dense(2 * D, name="up")(h)))


class Carry(Block):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x), None


class Stack(nn.Module):
    lift: str = "unrolled"

    @nn.compact
    def __call__(self, x):
        scan = functools.partial(
            nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        if self.lift == "scan":
            return scan(Carry)(name="layers")(x)[0]
        if self.lift == "scan+remat":
            return scan(nn.remat(Carry, prevent_cse=False))(name="layers")(x)[0]
        block = {"unrolled": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.lift]
        for i in range(LAYERS):
            x = block(name=f"layers_{i}")(x)
        return x


class Setup(nn.Module):
    def setup(self):
        self.first, self.shared = nn.Dense(D), nn.Dense(D)

    def __call__(self, x):
        return self.shared(jnp.tanh(self.shared(self.first(x))))


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 4), name="split")(x)
        mixed = nn.DenseGeneral(D, axis=(-2, -1), name="join")(heads)
        return nn.DenseGeneral(6, axis=1, name="time")(mixed)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        many = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
        )
        return many(D, name="experts")(x).mean(0)


class ScannedExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Experts(name="mixture")(x), None

        scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="layers")(x)[0]


CASES = {
    "unrolled": (Stack("unrolled"), "out"),
    "remat": (Stack("remat"), "out"),
    "jit": (Stack("jit"), "out"),
    "scan": (Stack("scan"), "out"),
    "scan+remat": (Stack("scan+remat"), "out"),
    "setup": (Setup(), "first"),
    "shared": (Setup(), "shared"),
    "general": (General(), "(split|join|time)"),
    "vmap": (Experts(), "experts"),
    "scan of vmap": (ScannedExperts(), "experts"),
}


def params_of(model):
    return model.init(jax.random.key(0), X)["params"]


def doubled(tree):
    """In double precision, where two ways to compute one thing differ by rounding alone."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def randomised(variables, scale=0.3):
    """The delta away from its neutral start."""
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return {**variables, "delta": jax.tree.unflatten(structure, noisy)}


@pytest.mark.parametrize("case", CASES)
def test_starts_bit_identical_and_merges_exactly(case):
    model, address = CASES[case]
    params = params_of(model)
    tuned = attach(model, {address: LoRA(rank=2)})
    variables = tuned.init(jax.random.key(1), params, X)
    base = model.apply({"params": params}, X)
    np.testing.assert_array_equal(tuned.apply(variables, params, X), base)
    variables = randomised(variables)
    moved = jax.jit(tuned.apply)(variables, params, X)
    assert jnp.abs(moved - base).max() > 0.1
    merged = tuned.merge(params, variables)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    atol = 1e-6 * float(jnp.abs(moved).max())
    np.testing.assert_allclose(model.apply({"params": merged}, X), moved, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["unrolled", "scan+remat", "shared", "general", "scan of vmap"])
def test_gradients_equal_those_through_the_merged_weights(case, x64):
    model, address = CASES[case]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params_of(model))
    x = X.astype(jnp.float64)
    tuned = attach(model, {address: LoRA(rank=2)})
    variables = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64), randomised(tuned.init(jax.random.key(1), params, x))
    )

    def loss(variables):
        return jnp.sin(tuned.apply(variables, params, x)).sum()

    def oracle(variables):
        return jnp.sin(model.apply({"params": tuned.merge(params, variables)}, x)).sum()

    for got, wanted in zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(variables)) for f in (loss, oracle))):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
        assert jnp.abs(wanted).max() > 0


@pytest.mark.parametrize("address", ["norm", ""])
@pytest.mark.parametrize("lift", ["unrolled", "scan+remat"])
def test_adapters_train_anywhere(lift, address):
    if address == "" and lift != "unrolled":
        address = "layers"
    model = Stack(lift)
    params = params_of(model)
    tuned = attach(model, {address: Adapter(width=3)})
    variables = tuned.init(jax.random.key(1), params, X)
    base = model.apply({"params": params}, X)
    np.testing.assert_array_equal(tuned.apply(variables, params, X), base)
    moved = tuned.apply(randomised(variables), params, X)
    assert jnp.abs(moved - base).max() > 0.01
    with pytest.raises(InputError, match="Adapter cannot be merged"):
        tuned.merge(params, variables)


def test_scanned_and_unrolled_layers_are_one_model(x64):
    """Same seeds, same numbers; the scanned delta is the unrolled one stacked."""
    flat, scanned = Stack("unrolled"), Stack("scan")
    params, x = doubled(params_of(flat)), doubled(X)
    stacked = {
        "layers": jax.tree.map(
            lambda *layers: jnp.stack(layers), *(params[f"layers_{i}"] for i in range(LAYERS))
        )
    }
    spec = {"out": LoRA(2), "up": [LoRA(3), Adapter(2)]}
    one, two = attach(flat, spec), attach(scanned, spec)
    a, b = one.init(jax.random.key(1), params, x), two.init(jax.random.key(1), stacked, x)
    for path, leaf in flatten_dict(b["delta"]["layers"]).items():
        parts = [
            functools.reduce(lambda node, key: node[key], path, a["delta"][f"layers_{i}"])
            for i in range(LAYERS)
        ]
        np.testing.assert_array_equal(leaf, jnp.stack(parts))
    np.testing.assert_allclose(two.apply(b, stacked, x), one.apply(a, params, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [LoRA(2), Adapter(2)])
def test_a_layer_range_stores_only_its_rows_and_leaves_other_layers_alone(method, x64):
    flat, scanned = Stack("unrolled"), Stack("scan")
    params, x = doubled(params_of(flat)), doubled(X)
    stacked = {
        "layers": jax.tree.map(
            lambda *layers: jnp.stack(layers), *(params[f"layers_{i}"] for i in range(LAYERS))
        )
    }
    one, two = (attach(model, {"layers_{0,2}/out": method}) for model in (flat, scanned))
    a = randomised(one.init(jax.random.key(1), params, x))
    rows = [a["delta"][f"layers_{i}"] for i in (0, 2)]
    b = {"delta": {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *rows)}, "delta_state": {}}
    made = two.init(jax.random.key(1), stacked, x)
    assert jax.tree.map(jnp.shape, made["delta"]) == jax.tree.map(jnp.shape, b["delta"])
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(made))
    np.testing.assert_allclose(two.apply(b, stacked, x), one.apply(a, params, x), rtol=1e-12, atol=1e-12)
    if isinstance(method, LoRA):
        merged = two.merge(stacked, b)
        np.testing.assert_array_equal(
            merged["layers"]["out"]["kernel"][1], stacked["layers"]["out"]["kernel"][1]
        )
        np.testing.assert_allclose(
            scanned.apply({"params": merged}, x), one.apply(a, params, x), rtol=1e-12, atol=1e-12
        )


class HandWritten(nn.Module):
    """What `Stack` with LoRA on `out` would be if its author had written LoRA in."""

    lift: str

    @nn.compact
    def __call__(self, x):
        class LoRABlock(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = nn.LayerNorm(name="norm")(x)
                h = nn.relu(nn.Dense(2 * D, name="up")(h))
                a = self.param("a", nn.initializers.normal(), (2 * D, 2))
                b = self.param("b", nn.initializers.normal(), (2, D))
                y = nn.Dense(D, name="out")(h)
                return x + (y + project(project(h, a) * 8.0, b)), None

        if self.lift == "scan":
            scan = nn.scan(LoRABlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return scan(name="layers")(x)[0]
        for i in range(LAYERS):
            x = LoRABlock(name=f"layers_{i}")(x)[0]
        return x


def operations(jaxpr):
    """How often each primitive with each result type occurs, inner programs included."""
    counts = Counter()
    for equation in jaxpr.eqns:
        inner = [
            each
            for value in equation.params.values()
            for each in (value if isinstance(value, tuple) else (value,))
        ]
        inner = [
            getattr(each, "jaxpr", each) for each in inner if hasattr(each, "eqns") or hasattr(each, "jaxpr")
        ]
        for each in inner:
            counts += operations(each)
        counts[equation.primitive.name, str([out.aval for out in equation.outvars])] += 1
    return counts


@pytest.mark.parametrize("lift", ["unrolled", "scan"])
def test_the_traced_program_equals_the_hand_written_one(lift):
    model, written = Stack(lift), HandWritten(lift)
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(rank=2, alpha=16)})
    variables = tuned.init(jax.random.key(1), params, X)
    theirs = written.init(jax.random.key(0), X)

    def ours_loss(delta, params, x):
        return (tuned.apply({"delta": delta}, params, x) ** 2).sum()

    def their_loss(delta, params, x):
        whole = {name: {**params[name], **delta[name]} for name in params}
        return (written.apply({"params": whole}, x) ** 2).sum()

    theirs_delta = {name: {key: node[key] for key in "ab"} for name, node in theirs["params"].items()}
    for differentiate in (lambda f: f, jax.grad):
        ours = jax.make_jaxpr(differentiate(ours_loss))(variables["delta"], params, X)
        hand = jax.make_jaxpr(differentiate(their_loss))(theirs_delta, params, X)
        assert operations(ours.jaxpr) == operations(hand.jaxpr)
        # Arguments come in another order; the operations' text is otherwise the same.
        assert len(ours.jaxpr.eqns) == len(hand.jaxpr.eqns)
    compiled = [
        jax.jit(jax.grad(f)).lower(delta, params, X).compile().cost_analysis()["flops"]
        for f, delta in ((ours_loss, variables["delta"]), (their_loss, theirs_delta))
    ]
    assert compiled[0] == compiled[1]


def test_gradients_and_memory_are_of_the_deltas_size():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(4):
                x = nn.Dense(256, name=f"layers_{i}")(nn.relu(x))
            return x

    model, x = Wide(), jnp.ones((4, 256))
    params = model.init(jax.random.key(0), x)["params"]
    tuned = attach(model, {"re:layers_.": LoRA(2)})
    variables = tuned.init(jax.random.key(1), params, x)

    def loss(delta, params):
        return tuned.apply({**variables, "delta": delta}, params, x).sum()

    memory = jax.jit(jax.grad(loss)).lower(variables["delta"], params).compile().memory_analysis()
    delta_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["delta"]))
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert delta_bytes <= memory.output_size_in_bytes <= 1.05 * delta_bytes + 256
    assert memory.temp_size_in_bytes < backbone / 8
    full = jax.jit(jax.grad(lambda p: model.apply({"params": p}, x).sum())).lower(params).compile()
    assert full.memory_analysis().output_size_in_bytes >= backbone


def test_swapping_deltas_recompiles_nothing():
    model = Stack("scan")
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2)})
    traces = 0

    @jax.jit
    def run(variables, params, x):
        nonlocal traces
        traces += 1
        return tuned.apply(variables, params, x)

    tasks = [randomised(tuned.init(jax.random.key(i), params, X), 0.1 * i) for i in range(3)]
    outputs = [run(task, params, X) for task in tasks]
    assert traces == 1
    assert jnp.abs(outputs[0] - outputs[2]).max() > 0.01


@pytest.mark.parametrize("lift", ["unrolled", "scan"])
def test_a_batch_may_mix_tasks(lift):
    model = Stack(lift)
    params = params_of(model)
    tuned = attach(model, {"(out|up)": LoRA(2)})
    tasks = [randomised(tuned.init(jax.random.key(i), params, X), 0.1 * i) for i in range(3)]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    which = jnp.array([2, 0])
    chosen = jax.tree.map(lambda leaf: leaf[which], bank)
    mixed = jax.vmap(tuned.apply, in_axes=(0, None, 0))(chosen, params, X[:, None])[:, 0]
    for row, task in enumerate(which):
        alone = tuned.apply(tasks[int(task)], params, X[row : row + 1])[0]
        np.testing.assert_allclose(mixed[row], alone, rtol=1e-5, atol=1e-6)


def test_several_methods_stack_on_one_site_in_order():
    model = Setup()
    params = params_of(model)
    both = attach(model, {"first": [LoRA(2), LoRA(3, alpha=3.0), Adapter(2)]})
    variables = randomised(both.init(jax.random.key(1), params, X))
    names = set(variables["delta"]["first"])
    assert names == {"~lora", "~lora_1", "~adapter"}
    delta = variables["delta"]["first"]
    kernel, bias = params["first"]["kernel"], params["first"]["bias"]
    y = X @ kernel + bias
    y = y + (X @ delta["~lora"]["a"] @ delta["~lora"]["b"]) * 8.0
    y = y + X @ delta["~lora_1"]["a"] @ delta["~lora_1"]["b"]
    down = jax.nn.gelu(y @ delta["~adapter"]["down_kernel"] + delta["~adapter"]["down_bias"])
    y = y + down @ delta["~adapter"]["up_kernel"] + delta["~adapter"]["up_bias"]
    shared = params["shared"]
    z = jnp.tanh(y @ shared["kernel"] + shared["bias"]) @ shared["kernel"] + shared["bias"]
    np.testing.assert_allclose(both.apply(variables, params, X), z, rtol=1e-5, atol=1e-5)


def test_two_loras_on_one_site_merge():
    model = Setup()
    params = params_of(model)
    tuned = attach(model, {"first": [LoRA(2), LoRA(3)]})
    variables = randomised(tuned.init(jax.random.key(1), params, X))
    merged = model.apply({"params": tuned.merge(params, variables)}, X)
    np.testing.assert_allclose(merged, tuned.apply(variables, params, X), rtol=1e-5, atol=1e-5)


def test_flax_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=D)
    mask = nn.make_causal_mask(jnp.ones(X.shape[:2]))
    params = model.init(jax.random.key(0), X, mask=mask, deterministic=True)["params"]
    tuned = attach(model, {"(query|value)": LoRA(2), "out": LoRA(2)})
    variables = randomised(tuned.init(jax.random.key(1), params, X, mask=mask, deterministic=True))
    assert variables["delta"]["query"]["~lora"]["a"].shape == (D, 2)
    moved = tuned.apply(variables, params, X, mask=mask, deterministic=True)
    merged = model.apply({"params": tuned.merge(params, variables)}, X, mask=mask, deterministic=True)
    np.testing.assert_allclose(merged, moved, rtol=1e-5, atol=1e-6)
    assert jnp.abs(moved - model.apply({"params": params}, X, mask=mask)).max() > 0.01


def test_a_subclass_that_calls_its_parent_is_one_site():
    class Louder(nn.Dense):
        def __call__(self, inputs):
            return 2.0 * super().__call__(inputs)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Louder(D, name="dense")(x)

    model = Model()
    params = params_of(model)
    tuned = attach(model, {"dense": Adapter(2)})
    variables = randomised(tuned.init(jax.random.key(1), params, X))
    delta = variables["delta"]["dense"]["~adapter"]
    y = 2.0 * (X @ params["dense"]["kernel"] + params["dense"]["bias"])
    hidden = jax.nn.gelu(y @ delta["down_kernel"] + delta["down_bias"])
    wanted = y + hidden @ delta["up_kernel"] + delta["up_bias"]
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_into_or_out_of_compiled_programs():
    """An interceptor left open during a trace would be baked in; one opened around a program, ignored."""
    model = Stack("jit")
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2)})
    variables = randomised(tuned.init(jax.random.key(1), params, X))
    plain = jax.jit(lambda params: model.apply({"params": params}, X))
    base = plain(params)
    moved = jax.jit(tuned.apply)(variables, params, X)
    louder = attach(model, {"out": LoRA(2, alpha=32.0)}).apply(variables, params, X)
    assert jnp.abs(moved - base).max() > 0.1
    assert jnp.abs(louder - moved).max() > 0.1
    np.testing.assert_array_equal(plain(params), base)
    np.testing.assert_array_equal(model.apply({"params": params}, X), model.apply({"params": params}, X))


def test_a_delta_whose_module_is_not_called_is_an_error():
    model = Setup()
    params = params_of(model)
    tuned = attach(model, {"first": LoRA(2)})
    variables = tuned.init(jax.random.key(1), params, X)
    other = Stack()
    with pytest.raises(InputError, match="first: the model did not call this module"):
        attach(other, {"first": LoRA(2)}).apply(variables, params_of(other), X)


def test_init_computes_nothing_of_the_backbone():
    """Abstract parameters and inputs are enough: no forward pass is run."""
    model = Stack("scan")
    params = jax.eval_shape(lambda: params_of(model))
    tuned = attach(model, {"out": LoRA(2)})
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    made = jax.eval_shape(tuned.init, jax.random.key(1), params, shape)
    assert made["delta"]["layers"]["out"]["~lora"]["a"].shape == (LAYERS, 2 * D, 2)


@pytest.mark.parametrize("lift", ["unrolled", "scan", "scan+remat"])
def test_dropout_draws_anew_for_each_layer_and_key(lift):
    model = Stack(lift)
    params = params_of(model)
    tuned = attach(model, {"out": LoRA(2, dropout=0.5)})
    variables = randomised(tuned.init(jax.random.key(1), params, X))
    seeds = jax.tree.leaves(variables["delta_state"])
    assert len(np.unique(np.concatenate([np.ravel(seed) for seed in seeds]))) == LAYERS
    run = functools.partial(tuned.apply, variables, params, X)
    still = run()
    first = run(rng=jax.random.key(5), train=True)
    assert jnp.abs(first - still).max() > 0
    np.testing.assert_array_equal(first, run(rng=jax.random.key(5), train=True))
    assert jnp.abs(first - run(rng=jax.random.key(6), train=True)).max() > 0
    np.testing.assert_array_equal(still, run(rng=jax.random.key(5)))
    with pytest.raises(InputError, match="needs rng="):
        run(train=True)


def test_dropout_keeps_the_mean():
    model = nn.Dense(D)
    x = jnp.ones((4000, D))
    params = model.init(jax.random.key(0), x)["params"]
    tuned = attach(model, {"": LoRA(2, dropout=0.3)})
    variables = randomised(tuned.init(jax.random.key(1), params, x))
    dropped = tuned.apply(variables, params, x, rng=jax.random.key(2), train=True) - model.apply(
        {"params": params}, x
    )
    kept = tuned.apply(variables, params, x) - model.apply({"params": params}, x)
    np.testing.assert_allclose(dropped.mean(0), kept.mean(0), atol=0.06 * float(jnp.abs(kept).max()))


def test_bfloat16_sites_keep_their_dtype():
    model = nn.Dense(D, dtype=jnp.bfloat16)
    params = params_of(model)
    for method in (LoRA(2), Adapter(2)):
        tuned = attach(model, {"": method})
        variables = tuned.init(jax.random.key(1), params, X)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
        y = tuned.apply(variables, params, X)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, model.apply({"params": params}, X))


def test_lora_starts_as_in_peft():
    params = nn.Dense(64).init(jax.random.key(0), jnp.ones((1, 100)))["params"]
    made = attach(nn.Dense(64), {"": LoRA(32)}).init(jax.random.key(1), params, jnp.ones((1, 100)))
    a = made["delta"]["~lora"]["a"]
    assert np.abs(a).max() <= 0.1 and np.abs(a).max() > 0.098
    np.testing.assert_allclose(np.std(a), 0.1 / np.sqrt(3), rtol=0.03)
    assert not made["delta"]["~lora"]["b"].any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"out": LoRA(9)}, "layers_0/out: LoRA rank=9 exceeds its 16x8 matrix; at most 8"),
        ({"layers_0": LoRA(2)}, "layers_0: LoRA needs a module that multiplies its input by a 'kernel'"),
        ({"norm": LoRA(2)}, "layers_0/norm: LoRA needs a module"),
        ([LoRA(2)], "maps addresses to methods, {'attention/query': LoRA\\(\\)}; this is a list"),
        ({}, "this is empty"),
        ({"out": LoRA}, "delta at 'out': .*LoRA.* is no delta method such as"),
        ({"out": "LoRA"}, "delta at 'out': 'LoRA' is no delta method such as"),
        ({3: LoRA(2)}, "delta address 3 is no text"),
        ({"owt": LoRA(2)}, r"'owt' names no module; near misses: out"),
        ({"layers_{0-7}/out": LoRA(2)}, "names layer 7; the model has layers 0-2"),
    ],
)
def test_bad_specifications_say_what_is_wrong(spec, message):
    model = Stack()
    with pytest.raises(InputError, match=message) as caught:
        attach(model, spec).init(jax.random.key(1), params_of(model), X)
    assert "\n" not in str(caught.value)


def test_bad_attachments_say_what_is_wrong():
    model = Stack()
    with pytest.raises(InputError, match="names nothing; near misses: up"):
        attach(model, {"out": LoRA(2)}, exclude=["upp"]).init(jax.random.key(1), params_of(model), X)
    with pytest.raises(InputError, match="is empty"):
        attach(model, {})
    with pytest.raises(InputError, match="is no delta method"):
        attach(model, {"out": "lora"})
    with pytest.raises(InputError, match=r"wrapped as \{'params'"):
        attach(model, {"out": LoRA(2)}).init(jax.random.key(1), {"params": params_of(model)}, X)
    for build in (
        lambda: LoRA(rank=0),
        lambda: LoRA(dropout=1.0),
        lambda: Adapter(0),
        lambda: Adapter(3, "x"),
    ):
        with pytest.raises(InputError, match="="):
            build()


def test_convolutions_are_refused():
    model = nn.Conv(8, (3,))
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(InputError, match="Conv does not"):
        attach(model, {"": LoRA(2)}).init(jax.random.key(1), params, X)


@dataclass(frozen=True)
class Scale(SiteMethod):
    """A method of one's own: a few lines, with a neutral value and an argument that it changes."""

    name: ClassVar[str] = "scale"
    positions: ClassVar[tuple[str, ...]] = ("out",)
    neutral: ClassVar[float] = 1.0

    def init(self, rng, site: Site, args, output):
        return {"factor": jnp.full(args[0].shape[-1], 2.0)}

    def state(self, rng, site, args, output, trained):
        return {"gain": jnp.full((), 3.0)}

    def apply(self, variables, site, call, args, kwargs):
        return call(args[0] * variables["factor"], *args[1:], **kwargs) * variables["gain"]


def test_a_method_of_ones_own_with_state_and_neutral_value():
    flat, scanned = Stack("unrolled"), Stack("scan")
    params = params_of(flat)
    stacked = {
        "layers": jax.tree.map(
            lambda *layers: jnp.stack(layers), *(params[f"layers_{i}"] for i in range(LAYERS))
        )
    }
    outputs = []
    for model, backbone in ((flat, params), (scanned, stacked)):
        tuned = attach(model, {"layers_{1}/out": Scale()})
        variables = tuned.init(jax.random.key(1), backbone, X)
        assert len(jax.tree.leaves(variables["delta"])) == len(jax.tree.leaves(variables["delta_state"])) == 1
        outputs.append(tuned.apply(variables, backbone, X))
    largest = float(jnp.abs(outputs[0]).max())  # a sum near 0 keeps the error of its large terms
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-6 * largest)
    assert jnp.abs(outputs[0] - flat.apply({"params": params}, X)).max() > 0.01
    assert len(attach(flat, Scale()).init(jax.random.key(1), params, X)["delta"]) == LAYERS


@dataclass(frozen=True)
class Halved(Scale):
    """Starts from the weights themselves, as the initialisations of PiSSA and DoRA do."""

    name: ClassVar[str] = "halved"
    reads: ClassVar[bool] = True

    def init(self, rng, site, args, output):
        return {"half": site.params["kernel"] / 2}

    def state(self, rng, site, args, output, trained):
        return {}

    def apply(self, variables, site, call, args, kwargs):
        return call(*args, **kwargs) - args[0] @ variables["half"]


@pytest.mark.parametrize("case", ["unrolled", "scan", "vmap", "scan of vmap"])
def test_a_method_may_start_from_the_weights(case):
    model, address = CASES[case]
    params = params_of(model)
    tuned = attach(model, {address: Halved()})
    variables = tuned.init(jax.random.key(1), params, X)

    def halve(path, leaf):
        names = [key.key for key in path]
        return leaf / 2 if names[-2:] == [address, "kernel"] else leaf

    wanted = model.apply({"params": jax.tree_util.tree_map_with_path(halve, params)}, X)
    np.testing.assert_allclose(tuned.apply(variables, params, X), wanted, rtol=1e-5, atol=1e-5)
