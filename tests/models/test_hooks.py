"""Reading and editing activations: what is seen, what an edit changes, and that hooks cost nothing."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    Hook,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
    run_with_edits,
    stack_layers,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]])
CONFIG = TransformerConfig(layers=2, width=8, vocab=7, attention=multi_head(2), mlp=MLP(12, "relu"))
MODEL, SCANNED = Transformer(CONFIG), Transformer(replace(CONFIG, scan=True))


@pytest.fixture(scope="module")
def params(random_parameters):
    return random_parameters(MODEL, TOKENS)


def program(function, *args):
    return str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize("scan", [False, True])
def test_hooks_that_nobody_uses_leave_no_trace(scan, params):
    model = SCANNED if scan else MODEL
    params = stack_layers(params) if scan else params

    def skip_hooks(next_call, args, kwargs, context):
        is_hook = isinstance(context.module, Hook) and context.method_name == "__call__"
        return args[0] if is_hook else next_call(*args, **kwargs)

    with nn.intercept_methods(skip_hooks):
        without = program(model.apply, params, TOKENS)
    assert program(model.apply, params, TOKENS) == without


def test_reading_adds_no_operation_and_an_edit_adds_its_own(params):
    plain = jax.make_jaxpr(MODEL.apply)(params, TOKENS)
    read = jax.make_jaxpr(lambda p, x: run_with_cache(MODEL, p, x, names=["mlp/act"]))(params, TOKENS)
    edited = jax.make_jaxpr(lambda p, x: run_with_edits(MODEL, p, x, edits={"mlp/act": jnp.negative}))
    assert [e.primitive for e in read.eqns] == [e.primitive for e in plain.eqns]
    assert len(edited(params, TOKENS).eqns) == len(plain.eqns) + CONFIG.layers


def test_all_sites_can_be_read(params):
    run = jax.jit(lambda p, x: run_with_cache(MODEL, p, x, names=[".*"]))
    logits, seen = run(params, TOKENS)
    np.testing.assert_allclose(logits, jax.jit(MODEL.apply)(params, TOKENS), atol=1e-6)
    shapes = {path: value.shape for path, value in seen.items() if hasattr(value, "shape")}
    expected = {
        "embedded": (2, 4, 8),
        "layers_0/attention/query": (2, 4, 8),
        "layers_0/attention/value": (2, 4, 8),
        "layers_1/attention/heads": (2, 4, 2, 4),
        "layers_1/mlp/act": (2, 4, 12),
        "layers_1/middle": (2, 4, 8),
        "layers_1/residual": (2, 4, 8),
        "head": (2, 4, 7),
    }
    assert expected.items() <= shapes.items()
    np.testing.assert_array_equal(seen["head"], logits)


def test_scanned_layers_come_back_stacked(params):
    _, seen = jax.jit(lambda p: run_with_cache(MODEL, p, TOKENS, names=["mlp/act"]))(params)
    stacked = stack_layers(params)
    _, scanned = jax.jit(lambda p: run_with_cache(SCANNED, p, TOKENS, names=["mlp/act"]))(stacked)
    rows = np.stack([seen[f"layers_{i}/mlp/act"] for i in range(2)])
    np.testing.assert_allclose(scanned["layers/mlp/act"], rows, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputed_layers_can_be_read_and_differentiated_through(remat, params):
    model = Transformer(replace(CONFIG, scan=True, remat=remat))

    def score(params):
        _, seen = run_with_cache(model, params, TOKENS, names=["mlp/act"])
        return sum(value.sum() for value in seen.values())

    def plain(params):
        _, seen = run_with_cache(MODEL, params, TOKENS, names=["mlp/act"])
        return sum(value.sum() for value in seen.values())

    gradient = jax.jit(jax.grad(score))(stack_layers(params))
    expected = stack_layers(jax.jit(jax.grad(plain))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected)


def test_reduce_keeps_only_the_statistic(params):
    def share_active(path, value):
        assert path.endswith("mlp/act")
        return {"active": (value > 0).mean((0, 1)), "largest": value.max()}

    def run(params):
        return run_with_cache(SCANNED, params, TOKENS, names=["mlp/act"], reduce=share_active)

    _, seen = jax.jit(run)(stack_layers(params))
    kept = seen["layers/mlp/act"]
    assert kept["active"].shape == (2, 12) and kept["largest"].shape == (2,)
    _, full = jax.jit(lambda p: run_with_cache(MODEL, p, TOKENS, names=["mlp/act"]))(params)
    for layer in range(2):
        active = (full[f"layers_{layer}/mlp/act"] > 0).mean((0, 1))
        np.testing.assert_allclose(kept["active"][layer], active, atol=1e-6)
    stored = jax.eval_shape(run, stack_layers(params))[1]
    assert all(leaf.size <= 24 for leaf in jax.tree.leaves(stored))


def test_reading_under_vmap(params):
    rows = np.stack([TOKENS, TOKENS[::-1]])
    each = jax.vmap(lambda x: run_with_cache(MODEL, params, x, names=["mlp/act"])[1])
    seen = jax.jit(each)(rows)["layers_0/mlp/act"]
    assert seen.shape == (2, 2, 4, 12)
    np.testing.assert_allclose(seen[0], seen[1][::-1], atol=1e-6)


def test_an_edit_changes_what_lies_behind_it_and_nothing_before(params):
    names = ["embedded", "residual", "mlp/act"]

    def both(params):
        _, plain = run_with_cache(MODEL, params, TOKENS, names=names)
        edits = {"layers_1/mlp/act": lambda act: act.at[:, 2].set(0)}
        edited_logits = run_with_edits(MODEL, params, TOKENS, edits=edits)
        return plain, edited_logits, MODEL.apply(params, TOKENS)

    plain, edited, logits = jax.jit(both)(params)
    down = params["layers_1"]["mlp"]["down"]
    change = np.zeros((2, 4, 8))
    change[:, 2] = np.asarray(plain["layers_1/mlp/act"])[:, 2] @ down["kernel"]
    residual = np.asarray(plain["layers_1/residual"]) - change
    centred = residual - residual.mean(-1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    hidden = hidden * params["final_norm"]["scale"] + params["final_norm"]["bias"]
    np.testing.assert_allclose(edited, hidden @ params["embedding"]["table"].T, atol=2e-4)
    np.testing.assert_array_equal(np.delete(edited, 2, 1), np.delete(logits, 2, 1))  # other positions
    assert np.abs(edited - logits)[:, 2].max() > 1e-2


def test_edits_apply_in_order_and_reach_scanned_layers(params):
    edits = {"mlp/act": lambda act: act * 0, "mlp": lambda y: y + 1}
    unrolled = jax.jit(lambda p: run_with_edits(MODEL, p, TOKENS, edits=edits))(params)
    scanned = jax.jit(lambda p: run_with_edits(SCANNED, p, TOKENS, edits=edits))(stack_layers(params))
    np.testing.assert_allclose(scanned, unrolled, atol=1e-4)


def test_a_value_can_be_patched_from_another_run(params):
    other = TOKENS[::-1]
    _, seen = run_with_cache(MODEL, params, other, names=["embedded"])
    patched = run_with_edits(MODEL, params, TOKENS, edits={"embedded": lambda _: seen["embedded"]})
    np.testing.assert_allclose(patched, MODEL.apply(params, other), atol=1e-5)


@pytest.mark.parametrize("run", ["cache", "edits"])
def test_a_name_that_matches_nothing_is_an_error(run, params):
    with pytest.raises(InputError, match="hook name 'mlp/akt' matches no site") as error:
        if run == "cache":
            run_with_cache(MODEL, params, TOKENS, names=["mlp/act", "mlp/akt"])
        else:
            run_with_edits(MODEL, params, TOKENS, edits={"mlp/akt": jnp.negative})
    assert "\n" not in str(error.value)


def test_names_start_at_a_path_component(params):
    _, seen = run_with_cache(MODEL, params, TOKENS, names=["norm|query"])
    assert set(seen) == {"layers_0/attention/query", "layers_1/attention/query"}


class Foreign(nn.Module):
    """A module that knows nothing of this library."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(5, name="in")(x)))


def test_any_linen_module_can_be_read_and_edited():
    x = jnp.ones((2, 4))
    params = Foreign().init(jax.random.key(0), x)["params"]
    _, seen = run_with_cache(Foreign(), params, x, names=["in"])
    assert seen["in"].shape == (2, 5)
    edited = run_with_edits(Foreign(), params, x, edits={"in": lambda h: h * 0})
    np.testing.assert_array_equal(edited, np.broadcast_to(params["out"]["bias"], (2, 3)))


def test_a_model_without_modules_has_no_sites():
    class Pure:
        def init(self, rng, *args, **kwargs):
            return {}

        def apply(self, params, *args, rng=None, train=False, **kwargs):
            return args[0]

    with pytest.raises(InputError, match="Pure is not a Linen model: its sites cannot be intercepted"):
        run_with_cache(Pure(), {}, TOKENS, names=["x"])
