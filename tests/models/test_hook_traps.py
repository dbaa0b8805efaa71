"""Traps of interception in JAX: each is shown to be stepped over, or to be an error that says what to do."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, Transformer, TransformerConfig, multi_head, stack_layers
from modicum.models.config import Layer
from modicum.models.hooks import Given, Hook, run_with_cache, run_with_edits, site_shapes

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]])
CONFIG = TransformerConfig(layers=2, width=8, vocab=7, attention=multi_head(2), mlp=MLP(12, "relu"))
MODEL, SCANNED = Transformer(CONFIG), Transformer(replace(CONFIG, scan=True))
ACT = "mlp/act"


@pytest.fixture(scope="module")
def params(random_parameters):
    return random_parameters(MODEL, TOKENS)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Hook(name="act")(nn.relu(nn.Dense(3, name="in")(x))), None


class Scanned(nn.Module):
    carried: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0} | ({"hooks": 0, "edits": 0} if self.carried else {})
        scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="layers")(x, None)[0]


def test_a_scan_that_keeps_what_was_read_to_itself_is_an_error():
    x = jnp.ones((2, 3))
    params = Scanned(True).init(jax.random.key(0), x)["params"]
    assert run_with_cache(Scanned(True), params, x, names=["act"])[1]["layers/act"].shape == (2, 2, 3)
    with pytest.raises(InputError, match=r"layers/act was read, but .* give nn.scan .*'hooks': 0"):
        run_with_cache(Scanned(False), params, x, names=["act"])
    edits = {"act": Given(jnp.multiply, {"layers/act": jnp.zeros((2, 3))})}
    assert not run_with_edits(Scanned(True), params, x, edits=edits).any()
    with pytest.raises(InputError, match=r"layers/act.*does not hand in the collection 'edits'"):
        run_with_edits(Scanned(False), params, x, edits=edits)


def test_what_is_compiled_goes_on_reading_and_editing_and_what_is_not_stays_free(params):
    """An interceptor around a compiled function would be ignored, one around the first trace would stay."""
    traces = []

    @jax.jit
    def ablated(params, mask):
        traces.append(1)
        return run_with_edits(
            MODEL, params, TOKENS, edits={ACT: Given(jnp.multiply, {"layers_0/mlp/act": mask})}
        )

    plain = jax.jit(MODEL.apply)
    before = plain(params, TOKENS)
    every = ablated(params, jnp.ones(12))
    np.testing.assert_array_equal(plain(params, TOKENS), before)
    np.testing.assert_allclose(every, before, atol=1e-6)
    for neuron in range(3):  # other masks: another result of the same program
        mask = jnp.ones(12).at[neuron].set(0)
        expected = run_with_edits(
            MODEL,
            params,
            TOKENS,
            edits={"layers_0/mlp/act": lambda act, neuron=neuron: act.at[..., neuron].set(0)},
        )
        np.testing.assert_allclose(ablated(params, mask), expected, atol=1e-5)
    assert len(traces) == 1


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="shared")
        return dense(nn.relu(dense(x)))


def test_a_shared_module_gives_an_entry_for_each_call():
    x = jnp.arange(6.0).reshape(2, 3)
    params = Twice().init(jax.random.key(0), x)["params"]
    output, seen = run_with_cache(Twice(), params, x, names=["shared"])
    first, second = seen["shared"]
    np.testing.assert_allclose(first, x @ params["shared"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(second, output)


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(3, name="in")(x))


def test_a_bare_function_is_no_site_and_is_not_read_in_silence():
    x = jnp.ones((1, 2))
    params = Bare().init(jax.random.key(0), x)["params"]
    with pytest.raises(InputError, match="'relu' matches no site"):
        run_with_cache(Bare(), params, x, names=["relu"])


def test_each_scanned_layer_gets_its_own_row_of_the_data(params):
    """An interceptor sees one path for all layers and no number: the data go through the scan."""
    masks = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 12)), jnp.float32)

    def unrolled(params, masks):
        values = {f"layers_{layer}/mlp/act": masks[layer] for layer in range(2)}
        return run_with_edits(MODEL, params, TOKENS, edits={ACT: Given(jnp.multiply, values)})

    def scanned(params, masks):
        edits = {ACT: Given(jnp.multiply, {"layers/mlp/act": masks})}
        return run_with_edits(SCANNED, params, TOKENS, edits=edits)

    found = jax.jit(scanned)(stack_layers(params), masks)
    np.testing.assert_allclose(found, jax.jit(unrolled)(params, masks), atol=1e-4)
    swapped = jax.jit(scanned)(stack_layers(params), masks[::-1])
    assert np.abs(np.asarray(swapped) - np.asarray(found)).max() > 1e-3


def test_gradients_by_activations_fit_any_batch(params):
    """`nn.perturb` keeps zeros of the shape that the model was made with; data are made for each call."""

    def score(zeros, tokens):
        return run_with_edits(MODEL, params, tokens, edits={ACT: Given(jnp.add, zeros)}).sum()

    for tokens in (TOKENS, TOKENS[:1, :3]):
        shapes = site_shapes(MODEL, params, tokens, names=[ACT])
        zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
        gradient, compiled = jax.jit(jax.grad(score))(zeros, tokens), jax.jit(score)
        assert gradient["layers_1/mlp/act"].shape == (*tokens.shape, 12)
        step = jnp.zeros((*tokens.shape, 12)).at[0, 1, 5].set(1e-2)
        up, down = ({**zeros, "layers_1/mlp/act": sign * step} for sign in (1, -1))
        slope = compiled(up, tokens) - compiled(down, tokens)
        np.testing.assert_allclose(gradient["layers_1/mlp/act"][0, 1, 5], slope / 2e-2, atol=2e-3, rtol=2e-2)


def test_unused_reading_is_free_after_compilation(params):
    def cost(function):
        return jax.jit(function).lower(params).compile().cost_analysis()["flops"]

    plain = cost(lambda p: MODEL.apply(p, TOKENS))
    assert cost(lambda p: run_with_cache(MODEL, p, TOKENS, names=[".*"])[0]) == plain

    def after(layer):
        return cost(lambda p: run_with_cache(MODEL, p, TOKENS, names=[f"layers_{layer}/residual"])[1])

    assert after(0) < 0.55 * after(1) < 0.55 * plain  # what lies behind is not computed
    given = np.ones((2, 4, 8), np.float32)
    edits = {"layers_0/residual": lambda x: given}
    assert cost(lambda p: run_with_edits(MODEL, p, TOKENS, edits=edits)) < 0.6 * plain  # nor what before


def test_data_reach_layers_that_differ_and_are_recomputed(random_parameters):
    pattern = Layer(mlp=MLP(12, "relu")), Layer(mlp=MLP(5, "gelu"))
    config = replace(CONFIG, layers=4, pattern=pattern, scan=True, remat="full")
    model = Transformer(config)
    params = random_parameters(model, TOKENS)
    shapes = site_shapes(model, params, TOKENS, names=[ACT])
    assert {path: shape.shape for path, shape in shapes.items()} == {
        "layers/layer_0/mlp/act": (2, 2, 4, 12),
        "layers/layer_1/mlp/act": (2, 2, 4, 5),
    }

    def score(mask):
        edits = {ACT: Given(jnp.multiply, {"layers/layer_1/mlp/act": mask})}
        return run_with_edits(model, params, TOKENS, edits=edits).sum()

    gradient = jax.jit(jax.grad(score))(jnp.ones((2, 5)))
    assert gradient.shape == (2, 5) and np.abs(gradient).min() > 0


def test_data_where_no_site_is_are_an_error(params):
    def run(name, path, **more):
        edits = {name: Given(jnp.add, {path: jnp.zeros(12)})}
        return run_with_edits(MODEL, params, TOKENS, edits=edits, **more)

    with pytest.raises(InputError, match="edit 'mlp/act' has data for 'layers_0/mlp/up'"):
        run(ACT, "layers_0/mlp/up")
    with pytest.raises(InputError, match=r"layers_7/mlp/act.*the model calls no such site"):
        run(ACT, "layers_7/mlp/act")
    with pytest.raises(InputError, match="calls without a cache"):
        run(ACT, "layers_0/mlp/act", cache=object())
