"""Every measure finds what was planted in activations, and does not find it in a shuffled control."""

import dataclasses
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, Hook, Transformer, TransformerConfig, multi_head
from modicum.models.placement import placed
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.sparsity import (
    Counter,
    Survey,
    coactivation,
    coactivation_rows,
    correlation,
    find_thresholds,
    load_statistics,
    measure,
    measure_mass,
    save_statistics,
)
from modicum.research.sparsity.statistics import LayerStatistics

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS, F, GROUP = 512, 12, 4
DEAD, BUSY = 10, 11


class Given(nn.Module):
    """A model whose neurons are its inputs."""

    @nn.compact
    def __call__(self, tokens):
        return Hook(name="act")(tokens)


def planted(seed=0):
    """`[1, TOKENS, F]`: neurons 0-3 fire together on a quarter of the tokens, 4-9 each for itself on a tenth.

    Neuron 10 never fires, 11 always does. What fires is 1, or of neurons 4-9 negative.
    """
    draw = np.random.default_rng(seed)
    fires = np.zeros((TOKENS, F), bool)
    fires[:, :GROUP] = draw.random((TOKENS, 1)) < 0.25
    fires[:, GROUP:DEAD] = draw.random((TOKENS, DEAD - GROUP)) < 0.1
    fires[:, BUSY] = True
    return np.where(fires, np.where((np.arange(F) >= GROUP) & (np.arange(F) < DEAD), -1.0, 1.0), 0.0)[None]


def shuffled(activations, seed=1):
    """Each neuron's tokens in an order of their own: how often it fires stays, with whom does not."""
    return np.random.default_rng(seed).permuted(activations, axis=1)


def counted(activations, **options):
    batches = [{"tokens": part.astype(np.float32)} for part in np.split(activations, 2, axis=1)]
    real = options.pop("real", lambda batch, path: jnp.ones(batch["tokens"].shape[:2], bool))
    return measure(Given(), {}, batches, names="act", real=real, **options).layers[0]


def test_neurons_that_fire_together_are_found_and_not_in_the_control():
    values = planted()
    layer, control = (counted(each, together=True, sizes=True) for each in (values, shuffled(values)))
    fires = values[0] != 0
    np.testing.assert_array_equal(layer.together, fires.T.astype(int) @ fires)
    np.testing.assert_array_equal(np.diag(control.together), layer.active)
    found = correlation(layer)
    np.testing.assert_allclose(found[:DEAD, :DEAD], np.corrcoef(fires[:, :DEAD].T), atol=1e-9)
    np.testing.assert_allclose(found[:GROUP, :GROUP], 1.0)
    assert not found[DEAD:].any() and not found[:, DEAD:].any()
    rows, chance = coactivation_rows([layer])[0], coactivation_rows([control])[0]
    assert rows["strongest pair"] == "0 and 1" and rows["its φ"] == pytest.approx(1.0)
    assert rows["pairs above 0.5"] == pytest.approx(6 / 66) and chance["pairs above 0.5"] == 0.0
    assert rows["mean |φ|"] > 3 * rows["by chance"] and chance["mean |φ|"] < 1.5 * chance["by chance"]


def test_pairs_are_summed_a_few_rows_at_a_time_as_all_at_once(monkeypatch):
    layer = counted(planted(), together=True, sizes=True)
    [whole] = coactivation_rows([layer])
    monkeypatch.setattr(coactivation, "BLOCK", 5 * F)  # blocks of 5, 5 and 2 rows
    [parts] = coactivation_rows([layer])
    assert whole.pop("mean |φ|") == pytest.approx(parts.pop("mean |φ|"), rel=1e-12) and whole == parts
    pairs = correlation(layer)[np.triu_indices(F, 1)]
    assert parts["its φ"] == pairs.max() and parts["pairs above 0.5"] == (pairs > 0.5).mean()


def test_a_wide_layers_pairs_take_bounded_memory():
    width, tokens = 2048, 1000
    active = np.random.default_rng(0).integers(1, tokens, width)
    together = np.minimum.outer(active, active)  # neurons fire in one order
    zeros = np.zeros(width + 1, np.int64)
    layer = LayerStatistics("wide", tokens, active, 0, zeros[1:], zeros, together)
    tracemalloc.start()
    [row] = coactivation_rows([layer])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20 and row["its φ"] == pytest.approx(1.0)


def test_silent_and_busy_neurons_and_idle_inputs():
    values = planted()
    layer, control = counted(values), counted(shuffled(values))
    assert list(layer.dead) == [*range(GROUP, DEAD), DEAD] and list(layer.always_on) == [BUSY]
    few = layer.fraction_of_inputs_below(2 / F)  # tokens without the group: the busy neuron alone
    assert few == pytest.approx(1 - (values[0, :, 0] > 0).mean())
    assert control.fraction_of_inputs_below(2 / F) < 0.5 * few
    np.testing.assert_array_equal(control.frequency, layer.frequency)


def test_sizes_count_what_is_negative_too():
    values = planted()
    signed, sizes = counted(values), counted(values, sizes=True)
    np.testing.assert_array_equal(sizes.active, (values[0] != 0).sum(0))
    assert sizes.active_ratio == sizes.nonzero_ratio > signed.active_ratio
    assert counted(0.5 * values, sizes=True, threshold=0.7).active.sum() == 0


def test_mass_is_as_spread_as_was_planted():
    alike = np.ones((1, TOKENS, F), np.float32)
    alone = np.eye(F, dtype=np.float32)[np.random.default_rng(0).integers(0, F, TOKENS)][None]
    half = np.where(np.arange(F) < F // 2, 1.0, 0.0).astype(np.float32) * alike
    for values, effective, needed in ((alike, F, 11 / F), (alone, 1, 1 / F), (half, F // 2, 6 / F)):
        segments = np.ones((1, TOKENS), np.int32)
        wrapped = Wrapped()
        [found] = measure_mass(wrapped, {}, [{"tokens": values, "segments": segments}], names="act")
        assert found.effective == pytest.approx(effective, rel=1e-4)
        assert found.needed == pytest.approx(needed, rel=1e-4)


def test_a_threshold_falls_between_what_was_planted_small_and_large():
    draw = np.random.default_rng(0)
    large = draw.permuted(np.arange(TOKENS * F).reshape(1, TOKENS, F) % 10 == 0, axis=1)
    values = np.where(large, 4.0, 0.25).astype(np.float32)
    batch = {"tokens": values, "segments": np.ones((1, TOKENS), np.int32)}
    level = float(find_thresholds(Wrapped(), {}, [batch], 0.1, ["act"]).values["act"])
    assert 0.25 < level <= 4.0
    assert float(find_thresholds(Wrapped(), {}, [batch], 0.5, ["act"]).values["act"]) <= 0.25


def test_a_survey_is_both_measures_in_one_pass():
    values = planted().astype(np.float32)
    batches = [
        {"tokens": part, "segments": np.ones((1, TOKENS // 2), int)} for part in np.split(values, 2, 1)
    ]
    passes = []

    class Watched(Wrapped):
        def apply(self, *args, **kwargs):
            passes.append(1)
            return super().apply(*args, **kwargs)

    survey = Survey(Counter(Watched(), ("act",), sizes=True, together=True))
    parts = [survey.measure({}, [batch]) for batch in batches]
    assert len(passes) == 1  # traced once for both batches and both measures
    found = parts[0].merge(parts[1])
    options = {"names": "act", "sizes": True, "together": True}
    [layer], [wanted] = found.active.layers, measure(Wrapped(), {}, batches, **options).layers
    for name in ("active", "histogram", "together", "total"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(wanted, name))
    [mass], [alone] = found.mass, measure_mass(Wrapped(), {}, batches, names="act")
    np.testing.assert_allclose(mass.held, alone.held, rtol=1e-6)
    assert (mass.tokens, mass.width) == (alone.tokens, alone.width)
    assert (mass.needed, mass.effective) == pytest.approx((alone.needed, alone.effective))


class Wrapped(nn.Module):
    """`Given` with a `segments` argument, as our Transformer has."""

    @nn.compact
    def __call__(self, tokens, segments=None):
        return Hook(name="act")(tokens)


def test_a_mesh_counts_the_same():
    config = TransformerConfig(layers=2, width=8, vocab=12, attention=multi_head(4), mlp=MLP(16, "relu"))
    model, draw = Transformer(config), np.random.default_rng(0)
    batch = {"tokens": draw.integers(0, 12, (4, 8)), "segments": draw.integers(0, 2, (4, 8))}
    params = model.init(jax.random.key(0), batch["tokens"])
    alone = measure(model, params, [batch], together=True)
    layout = Layout(make_mesh(MeshShape.parse("data=2,tensor=4"), jax.devices()[:8]))
    there = jax.device_put(params, layout.parameters(jax.eval_shape(lambda: params), model.axes))
    split = placed(Counter(model, together=True).measure, layout)(there, [layout.place(batch)])
    for one, two in zip(alone.layers, split.layers, strict=True):
        assert one.tokens == two.tokens == (batch["segments"] > 0).sum()
        for name in ("active", "histogram", "together"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_pairs_are_added_stored_and_asked_for(tmp_path):
    layer = counted(planted(), together=True)
    np.testing.assert_array_equal(layer.merge(layer).together, 2 * layer.together)
    bare = dataclasses.replace(layer, together=None)
    with pytest.raises(InputError, match="with and without co-activation"):
        layer.merge(bare)
    with pytest.raises(InputError, match="measure with together=True"):
        correlation(bare)
    batch = {"tokens": planted().astype(np.float32), "segments": np.ones((1, TOKENS), int)}
    found = measure(Wrapped(), {}, [batch], names="act", sizes=True, together=True)
    loaded = load_statistics(save_statistics(tmp_path / "a.safetensors", found))
    assert loaded.sizes
    np.testing.assert_array_equal(loaded.layers[0].together, found.layers[0].together)
    with pytest.raises(InputError, match="of their sizes do not add"):
        found.merge(dataclasses.replace(found, sizes=False))
