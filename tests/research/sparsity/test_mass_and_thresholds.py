"""Mass statistics and thresholds against numpy on kept activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    GatedMLP,
    GroupedQuery,
    Transformer,
    TransformerConfig,
    run_with_cache,
    run_with_edits,
    stack_layers,
)
from modicum.research.sparsity.mass import SHARES, mass_rows, measure_mass
from modicum.research.sparsity.thresholds import find_thresholds

pytestmark = pytest.mark.usefixtures("quick_compile")
F = 40


def transformer(scan=False):
    return Transformer(
        TransformerConfig(
            layers=2, width=16, vocab=40, attention=GroupedQuery(2), mlp=GatedMLP(F, "silu"), scan=scan
        )
    )


@pytest.fixture(scope="module")
def given():
    model, draw = transformer(), np.random.default_rng(0)
    tokens = draw.integers(0, 40, (3, 4, 7)).astype(np.int32)
    segments = (np.arange(7) < draw.integers(1, 8, (3, 4))[..., None]).astype(np.int32)
    batches = [{"tokens": a, "segments": b} for a, b in zip(tokens, segments)]
    params = model.init(jax.random.key(0), jnp.asarray(tokens[0]))
    kept = []
    for batch in batches:
        _, seen = run_with_cache(
            model, params, batch["tokens"], segments=batch["segments"], names=["layers_1/mlp/act"]
        )
        kept.append(np.asarray(seen["layers_1/mlp/act"], np.float64)[batch["segments"] > 0])
    return model, params, batches, np.concatenate(kept)


def test_mass_is_what_numpy_finds(given):
    model, params, batches, kept = given
    layers = measure_mass(model, params, batches)
    assert [layer.name for layer in layers] == ["layers_0/mlp/act", "layers_1/mlp/act"]
    sizes = -np.sort(-np.abs(kept), axis=1)
    shares = sizes / sizes.sum(1, keepdims=True)
    running = shares.cumsum(1)
    layer = layers[1]
    assert (layer.tokens, layer.width) == (len(kept), F)
    counts = [max(1, round(share * F)) for share in SHARES]
    np.testing.assert_allclose(layer.held, [running[:, n - 1].mean() for n in counts], rtol=1e-4)
    assert layer.needed == pytest.approx(((running < 0.9).sum(1) + 1).mean() / F, rel=1e-3)
    assert layer.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum(1)).mean(), rel=1e-3)
    assert mass_rows(layers)[1]["mass in top 50%"] == pytest.approx(running[:, 19].mean(), rel=1e-4)


def test_scanned_layers_have_the_same_mass(given):
    model, params, batches, _ = given
    for one, two in zip(
        measure_mass(model, params, batches), measure_mass(transformer(True), stack_layers(params), batches)
    ):
        assert one.name == two.name and one.tokens == two.tokens
        np.testing.assert_allclose(one.held, two.held, rtol=1e-4)


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_a_threshold_leaves_the_wanted_share(given, keep):
    model, params, batches, kept = given
    found = find_thresholds(model, params, batches, keep)
    level = float(found.values["layers_1/mlp/act"])
    expected = np.quantile(np.abs(kept), 1 - keep)
    assert level == pytest.approx(expected, rel=0.05)
    batch = batches[0]
    edited = run_with_edits(model, params, batch["tokens"], segments=batch["segments"], edits=found.edits())
    plain = model.apply(params, batch["tokens"], segments=batch["segments"])
    assert np.abs(edited - plain)[batch["segments"] > 0].max() > 1e-4
    edit = next(iter(found.edits().values()))
    cut = edit.function(jnp.array([jnp.nan, level / 2, -2 * level]), level)
    np.testing.assert_allclose(cut, [np.nan, 0, -2 * level], rtol=1e-6)
    everything = find_thresholds(model, params, batches, 1.0).edits()
    same = run_with_edits(model, params, batch["tokens"], segments=batch["segments"], edits=everything)
    np.testing.assert_array_equal(same, plain)


def test_thresholds_of_scanned_layers_are_each_layers_own(given):
    model, params, batches, _ = given
    one = find_thresholds(model, params, batches, 0.3)
    scanned, stacked = transformer(True), stack_layers(params)
    two = find_thresholds(scanned, stacked, batches, 0.3)
    rows = two.values["layers/mlp/act"]
    np.testing.assert_allclose(rows, [one.values[f"layers_{i}/mlp/act"] for i in (0, 1)], rtol=0.03)
    tokens = batches[0]["tokens"]
    np.testing.assert_allclose(
        run_with_edits(scanned, stacked, tokens, edits=two.edits()),
        run_with_edits(model, params, tokens, edits=one.edits()),
        rtol=1e-3,
        atol=1e-3,
    )


def test_what_cannot_be_measured_is_named(given):
    model, params, batches, _ = given
    with pytest.raises(InputError, match=r"keep=0\.0"):
        find_thresholds(model, params, batches, 0.0)
    with pytest.raises(InputError, match="no batches"):
        find_thresholds(model, params, [], 0.5)
    with pytest.raises(InputError, match="matches no site"):
        find_thresholds(model, params, batches, 0.5, ["mlp/none"])
    with pytest.raises(InputError, match="no batches"):
        measure_mass(model, params, [])
