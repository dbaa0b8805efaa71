"""Deltas on Flax NNX models: equal to Linen's on equal weights, under scan, without recompiling, stored."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modicum import InputError
from modicum.research.delta import (
    IA3,
    OFT,
    SAID,
    Adapter,
    BitFit,
    Compacter,
    DiffPruning,
    DoRA,
    FlaxPrefix,
    Full,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    RandomSubset,
    SoftPrompt,
    VeRA,
    attach,
    attach_nnx,
    load_delta,
    save_delta,
    summary,
)
from modicum.research.delta.nnx import nnx_model

pytestmark = pytest.mark.usefixtures("quick_compile")

D, LAYERS = 8, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)


class Block(nnx.Module):
    """A layer whose attributes have the names of the Linen one below."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.out = nnx.LinearGeneral(2 * D, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.out(nnx.relu(self.up(x)))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)


class Rematerialised(Scanned):
    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)


class Compiled(Unrolled):
    """Has a compiled function of its own inside."""

    def __call__(self, x):
        for layer in self.layers:
            x = compiled_layer(layer, x)
        return x


@nnx.jit
def compiled_layer(layer, x):
    return layer(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=D, name="attention")
        x = x + attention(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(D, name="out")(nn.relu(nn.Dense(2 * D, name="up")(x)))


def stacked(tree):
    """The unrolled model's tree as the scanned model's."""
    rows = [tree["layers"][str(i)] for i in range(LAYERS)]
    return {**tree, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}


def moved(variables, scale=0.2):
    rng = np.random.default_rng(3)
    delta = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), variables["delta"]
    )
    return {**variables, "delta": delta}


@pytest.fixture(scope="module")
def unrolled():
    return Unrolled(nnx.Rngs(0))


METHODS = {
    "lora": {"attention/(query|value|out)": LoRA(2)},
    "lora on general": {"(up|out)": LoRA(2)},
    "adapter": {"(attention|out)": Adapter(3)},
    "ia3": {"(key|value)": IA3()},
    "bitfit": {"": BitFit()},
    "norms": {"": LayerNormTuning()},
    "full": {"up": Full()},
    "dora": {"(query|up)": DoRA(2)},
    "pissa": {"(up|out)": LoRA(2, initialisation="pissa")},
    "vera": {"attention/(query|value)": VeRA(4)},
    "oft": {"(query|up)": OFT(4)},
    "parallel adapter": {"attention": ParallelAdapter(3)},
    "compacter": {"out": Compacter(2, 2)},
    "several": {"attention/query": [LoRA(2), LoRA(1), Adapter(2)], "norm": BitFit()},
}


@pytest.mark.parametrize("name", METHODS)
def test_equal_to_linen_on_equal_weights(name):
    """Same parameters, same variables, same outputs, gradients and merged weights."""
    module = Block(nnx.Rngs(0))
    ours, params = attach_nnx(module, METHODS[name])
    linen = attach(LinenBlock(), METHODS[name])
    shapes = jax.eval_shape(LinenBlock().init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    variables, theirs = (tuned.init(jax.random.key(1), params, X) for tuned in (ours, linen))
    jax.tree.map(np.testing.assert_array_equal, variables, theirs)
    np.testing.assert_array_equal(ours.apply(variables, params, X), module(X))
    variables = moved(variables)

    def loss(tuned):
        return lambda v: jnp.sin(tuned.apply({**variables, "delta": v}, params, X)).sum()

    got, wanted = (jax.jit(jax.value_and_grad(loss(tuned)))(variables["delta"]) for tuned in (ours, linen))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert jnp.abs(ours.apply(variables, params, X) - module(X)).max() > 0.01


@pytest.mark.parametrize(
    ("make", "ranged"),
    [(Scanned, False), (Scanned, True), (Rematerialised, True)],
    ids=["scan, all layers", "scan, two layers", "scan and remat, two layers"],
)
def test_scanned_layers_are_the_unrolled_ones(unrolled, make, ranged, x64):
    """In double precision, where two ways to compute one thing differ by rounding alone."""
    numbers = "{0,2}" if ranged else "{0-}"
    spec = {f"layers/{numbers}/(attention/query|out)": [LoRA(2), Adapter(2)], f"layers/{numbers}": BitFit()}
    one, params = attach_nnx(unrolled, spec)
    two, shapes = attach_nnx(make(nnx.Rngs(1)), spec)
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, X))
    whole = stacked(params)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, shapes)
    variables = moved(one.init(jax.random.key(1), params, x))
    rows = [variables["delta"]["layers"][str(i)] for i in ((0, 2) if ranged else range(LAYERS))]
    delta = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}
    made = two.init(jax.random.key(1), whole, x)
    assert jax.tree.map(jnp.shape, made["delta"]) == jax.tree.map(jnp.shape, delta)
    wanted = one.apply(variables, params, x)
    got = jax.jit(two.apply)({"delta": delta}, whole, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    assert jnp.abs(wanted - unrolled(X)).max() > 0.05

    def loss(delta):
        return jnp.sin(two.apply({"delta": delta}, whole, x)).sum()

    slope = jax.jit(jax.grad(loss))(delta)
    theirs = jax.jit(jax.grad(lambda v: jnp.sin(one.apply({"delta": v}, params, x)).sum()))(
        variables["delta"]
    )
    rows = [theirs["layers"][str(i)] for i in ((0, 2) if ranged else range(LAYERS))]
    whole_slope = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}
    assert jax.tree.structure(slope) == jax.tree.structure(whole_slope)
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(whole_slope)):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [Unrolled, Scanned])
def test_merged_weights_make_a_module_again(make):
    module = make(nnx.Rngs(0))
    tuned, params = attach_nnx(module, {"(query|value|up|out)": LoRA(2), "": BitFit()})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    merged = tuned.model.module(tuned.merge(params, variables))
    assert type(merged) is make
    np.testing.assert_allclose(merged(X), tuned.apply(variables, params, X), rtol=1e-4, atol=1e-5)
    assert jnp.abs(merged(X) - module(X)).max() > 0.05


def test_the_users_model_is_not_touched(unrolled):
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(unrolled)))
    graph = nnx.graphdef(unrolled)
    output = unrolled(X)
    tuned, params = attach_nnx(unrolled, {"up": LoRA(2), "": BitFit()})
    tuned.apply(moved(tuned.init(jax.random.key(1), params, X)), params, X)
    assert nnx.graphdef(unrolled) == graph
    assert type(unrolled.layers[0].up) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(unrolled)), before)
    np.testing.assert_array_equal(unrolled(X), output)


def test_paths_are_those_of_the_model(unrolled):
    """Nothing of the backbone is renamed, as wrappers around modules would."""
    tuned, params = attach_nnx(unrolled, {"layers/{1}/up": LoRA(2)})
    assert set(params["layers"]["1"]) == {"norm", "attention", "up", "out"}
    delta = tuned.init(jax.random.key(1), params, X)["delta"]
    assert set(delta["layers"]) == {"1"} and set(delta["layers"]["1"]["up"]) == {"~lora"}


@pytest.mark.parametrize("make", [Scanned, Compiled], ids=["scan", "compiled inside"])
def test_swapping_recompiles_nothing(make):
    tuned, params = attach_nnx(make(nnx.Rngs(0)), {"up": LoRA(2)})
    traces = 0

    @jax.jit
    def run(variables, params, x):
        nonlocal traces
        traces += 1
        return tuned.apply(variables, params, x)

    tasks = [moved(tuned.init(jax.random.key(i), params, X), 0.1 * i) for i in range(3)]
    outputs = [run(task, params, X) for task in tasks]
    assert traces == 1
    assert jnp.abs(outputs[0] - outputs[2]).max() > 0.01


def test_a_function_compiled_inside_the_model_is_found_again():
    """Its graph definition with deltas is equal from call to call, and differs from the one without."""
    module = Compiled(nnx.Rngs(0))
    base = module(X)
    tuned, params = attach_nnx(module, {"up": LoRA(2)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    first = tuned.apply(variables, params, X)
    before = compiled_layer.jitted_fn._cache_size()
    for task in range(3):
        tuned.apply(moved(variables, 0.1 * task), params, X)
    assert compiled_layer.jitted_fn._cache_size() == before
    np.testing.assert_array_equal(tuned.apply(variables, params, X), first)
    np.testing.assert_array_equal(module(X), base)
    assert jnp.abs(first - base).max() > 0.01


@pytest.mark.parametrize("method", [RandomSubset(0.2), DiffPruning(start=0.5), SAID(12)], ids=str)
def test_array_methods(method, unrolled):
    tuned, params = attach_nnx(unrolled, method)
    variables = tuned.init(jax.random.key(1), params)
    np.testing.assert_array_equal(tuned.apply(variables, params, X), unrolled(X))
    variables = moved(variables)
    merged = tuned.model.module(tuned.merge(params, variables))
    np.testing.assert_allclose(merged(X), tuned.apply(variables, params, X), rtol=1e-5, atol=1e-5)
    assert jnp.abs(merged(X) - unrolled(X)).max() > 1e-3


def test_a_stored_delta_comes_back(tmp_path, unrolled):
    spec = {"layers/{1-2}/up": LoRA(2), "norm": BitFit(), "layers/{0}/out": Full()}
    tuned, params = attach_nnx(unrolled, spec)
    variables = moved(tuned.init(jax.random.key(1), params, X))
    save_delta(tmp_path, tuned, variables, params)
    model, same = nnx_model(unrolled)
    again, found = load_delta(tmp_path, model, same)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    np.testing.assert_array_equal(again.apply(found, same, X), tuned.apply(variables, params, X))
    other, params = nnx_model(Unrolled(nnx.Rngs(9)))
    with pytest.raises(InputError, match="this delta belongs to backbone"):
        load_delta(tmp_path, other, params)
    assert {row.status for row in summary(tuned, same, variables)} == {"frozen", "tuned", "added"}


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.again = self.first

    def __call__(self, x):
        return self.again(jnp.tanh(self.first(x)))


def test_a_shared_module_is_one_site():
    module = Shared(nnx.Rngs(0))
    tuned, params = attach_nnx(module, {"re:(first|again)": LoRA(2)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    assert len(variables["delta"]) == 1
    merged = tuned.model.module(tuned.merge(params, variables))
    np.testing.assert_allclose(tuned.apply(variables, params, X), merged(X), rtol=1e-5, atol=1e-5)


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.up(x))


def test_dropout_of_the_model_and_of_the_delta():
    module = Dropped(nnx.Rngs(0))
    tuned, params = attach_nnx(module, {"up": LoRA(2, dropout=0.5)})
    variables = moved(tuned.init(jax.random.key(1), params, X))

    def train(key):
        return tuned.apply(variables, params, X, rng=jax.random.key(key), train=True)

    np.testing.assert_array_equal(train(1), train(1))
    assert jnp.abs(train(1) - train(2)).max() > 0.01
    still = tuned.apply(variables, params, X)
    np.testing.assert_array_equal(still, tuned.apply(variables, params, X, rng=jax.random.key(3)))
    plain, params = attach_nnx(module, {"up": LoRA(2)})
    with pytest.raises(InputError, match=r"draws at random at drop/rngs/\w+: train=True needs rng="):
        plain.apply(plain.init(jax.random.key(1), params, X), params, X, train=True)


def test_dropout_of_the_delta_differs_by_layer():
    tuned, params = attach_nnx(Scanned(nnx.Rngs(0)), {"up": LoRA(2, dropout=0.5)})
    variables = moved(tuned.init(jax.random.key(1), params, X))
    assert len(np.unique(variables["delta_state"]["layers"]["up"]["~lora"]["seed"])) == LAYERS
    run = jax.jit(lambda key: tuned.apply(variables, params, X, rng=key, train=True))
    one, two = run(jax.random.key(1)), run(jax.random.key(2))
    assert jnp.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, run(jax.random.key(1)))


class Counted(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


class Half(nnx.Module):
    """Has a module that it calls only if asked."""

    def __init__(self, rngs):
        self.up, self.spare = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x, spare=False):
        return self.spare(x) if spare else self.up(x)


def test_what_cannot_be_is_an_error(unrolled):
    with pytest.raises(InputError, match="Counted keeps BatchStat at 'norm/mean' beside its parameters"):
        attach_nnx(Counted(nnx.Rngs(0)), {"up": LoRA(2)})
    with pytest.raises(InputError, match="takes an NNX module; LinenBlock is none"):
        attach_nnx(LinenBlock(), {"up": LoRA(2)})
    tuned, params = attach_nnx(unrolled, {"upp": LoRA(2)})
    with pytest.raises(InputError, match="'upp' names no module; near misses: up"):
        tuned.init(jax.random.key(1), params, X)
    tuned, params = attach_nnx(unrolled, {"up": LoRA(9)})
    with pytest.raises(InputError, match="layers/0/up: LoRA rank=9 exceeds its 8x16 matrix"):
        tuned.init(jax.random.key(1), params, X)
    tuned, params = attach_nnx(unrolled, {"up": LoRA(2)})
    variables = tuned.init(jax.random.key(1), params, X)
    with pytest.raises(InputError, match="layers/0/norm/bias: the NNX model has this parameter"):
        tuned.apply(variables, jax.tree.map(jnp.asarray, _without(params)), X)


def _without(params):
    first = {**params["layers"]["0"], "norm": {"scale": params["layers"]["0"]["norm"]["scale"]}}
    return {"layers": {**params["layers"], "0": first}}


def test_a_delta_whose_module_is_not_called_is_an_error():
    tuned, params = attach_nnx(Half(nnx.Rngs(0)), {"spare": LoRA(2)})
    with pytest.raises(InputError, match="'spare' names no module"):
        tuned.init(jax.random.key(1), params, X)
    variables = tuned.init(jax.random.key(1), params, X, spare=True)
    tuned.apply(variables, params, X, spare=True)
    with pytest.raises(InputError, match="spare: the model did not call this module"):
        tuned.apply(variables, params, X)


class Words(nnx.Module):
    """Embeds tokens and mixes them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(20, D, rngs=rngs)
        self.block = Block(rngs)

    def __call__(self, tokens):
        return self.block(self.embed(tokens))


@pytest.mark.parametrize("beside", [{}, {"embed": Adapter(2)}], ids=["alone", "on an adapted embedding"])
def test_a_soft_prompt(beside):
    """Its vectors stand before those of the tokens; the embedding's own delta acts first."""
    tokens, module = jnp.array([[3, 4, 5], [6, 7, 8]]), Words(nnx.Rngs(0))
    tuned, params = attach_nnx(module, {**beside, "": SoftPrompt(4, embed="embed")})
    variables = moved(tuned.init(jax.random.key(1), params, tokens))
    prompt = jnp.broadcast_to(variables["delta"]["~soft_prompt"]["prompt"], (2, 4, D))
    embedded = module.embed(tokens)
    if beside:
        alone, own = attach_nnx(module.embed, {"": Adapter(2)})
        embedded = alone.apply({"delta": variables["delta"]["embed"]}, own, tokens)
    wanted = module.block(jnp.concatenate([prompt, embedded], 1))[:, 4:]
    np.testing.assert_allclose(jax.jit(tuned.apply)(variables, params, tokens), wanted, rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda delta: tuned.apply({"delta": delta}, params, tokens).sum())(variables["delta"])
    assert jnp.abs(slope["~soft_prompt"]["prompt"]).max() > 1e-4


def by_hand(module, x, key, value, mask):
    """NNX's attention with keys and values `[n, G, K]` in front, which all queries see."""
    rows = [jnp.broadcast_to(each, (x.shape[0], *each.shape)) for each in (key, value)]
    keys = jnp.concatenate([rows[0], module.key(x)], 1)
    values = jnp.concatenate([rows[1], module.value(x)], 1)
    seen = jnp.concatenate([jnp.ones((5, 3), bool), mask], 1)
    return module.out(nnx.dot_product_attention(module.query(x), keys, values, mask=seen[None]))


@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_in_nnx_attention(causal):
    module = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    tuned, params = attach_nnx(module, {"": FlaxPrefix(3)})
    options = {"is_causal": causal}
    variables = tuned.init(jax.random.key(1), params, X, **options)
    prefix = variables["delta"]["~flax_prefix"]
    got = jax.jit(lambda v: tuned.apply(v, params, X, **options))(variables)
    mask = jnp.tril(jnp.ones((5, 5), bool)) if causal else jnp.ones((5, 5), bool)
    wanted = by_hand(module, X, prefix["key"], prefix["value"], mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got - module(X, **options)).max() > 0.01


def test_a_prefix_in_scanned_nnx_layers_leaves_the_others_alone():
    one, params = attach_nnx(Unrolled(nnx.Rngs(0)), {"layers/{0,2}/attention": FlaxPrefix(3)})
    two, _ = attach_nnx(Scanned(nnx.Rngs(0)), {"layers/{0,2}/attention": FlaxPrefix(3)})
    variables = one.init(jax.random.key(1), params, X)
    rows = {
        part: {"layers": jax.tree.map(lambda *r: jnp.stack(r), *(tree["layers"][i] for i in ("0", "2")))}
        for part, tree in variables.items()
    }
    got = jax.jit(two.apply)(rows, stacked(params), X)
    np.testing.assert_allclose(got, one.apply(variables, params, X), rtol=1e-4, atol=1e-4)


def test_our_prefix_says_that_it_acts_at_our_attention(unrolled):
    tuned, params = attach_nnx(unrolled, {"attention": Prefix(3)})
    with pytest.raises(InputError, match="Prefix acts at 'attend', and no module that this model called has"):
        tuned.init(jax.random.key(1), params, X)


def test_lora_at_an_embedding():
    """As at Linen's: rows of A are looked up."""
    module = nnx.Sequential(nnx.Embed(7, 6, rngs=nnx.Rngs(0)))
    tokens = jnp.array([[3, 4, 5], [6, 0, 1]])
    tuned, params = attach_nnx(module, {"layers/0": LoRA(2, alpha=3.0)})
    variables = tuned.init(jax.random.key(1), params, tokens)
    np.testing.assert_array_equal(tuned.apply(variables, params, tokens), module(tokens))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    got = tuned.apply(variables, params, tokens)
    merged = tuned.model.module(tuned.merge(params, variables))(tokens)
    assert jnp.abs(got - module(tokens)).max() > 0.01
    np.testing.assert_allclose(got, merged, rtol=1e-5, atol=1e-6)
