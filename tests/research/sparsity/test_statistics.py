"""Activation statistics against a plain numpy recomputation from activations that are kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    GatedMLP,
    GroupedQuery,
    Hook,
    Layer,
    Transformer,
    TransformerConfig,
    run_with_cache,
    stack_layers,
)
from modicum.research.sparsity import ActivationStatistics, load_statistics, measure, save_statistics

F, LAYERS = 24, 4


def transformer(**options):
    config = {"layers": LAYERS, "width": 16, "vocab": 40, "attention": GroupedQuery(4), "mlp": MLP(F, "relu")}
    return Transformer(config=TransformerConfig(**{**config, **options}))


def batches(count=3, rows=4, length=7):
    draw = np.random.default_rng(0)
    for _ in range(count):
        tokens = draw.integers(0, 40, (rows, length)).astype(np.int32)
        lengths = draw.integers(1, length + 1, rows)
        segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
        yield {"tokens": tokens, "segments": segments}


def kept_activations(model, params, name):
    """`[tokens, F]` of one hook over all batches, padding removed."""
    parts = []
    for batch in batches():
        _, cache = run_with_cache(
            model, params, batch["tokens"], segments=batch["segments"], names=["mlp/act"]
        )
        parts.append(np.asarray(cache[name])[batch["segments"] > 0])
    return np.concatenate(parts)


def assert_counts(layer, kept, threshold=0.0):
    active = kept > threshold
    assert layer.tokens == len(kept) and layer.width == kept.shape[1]
    np.testing.assert_array_equal(layer.active, active.sum(0))
    np.testing.assert_array_equal(layer.histogram, np.bincount(active.sum(1), minlength=kept.shape[1] + 1))
    assert layer.nonzero == (kept != 0).sum()
    np.testing.assert_allclose(layer.total, kept.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.dead, [i for i in range(layer.width) if not active[:, i].any()])
    np.testing.assert_array_equal(layer.always_on, [i for i in range(layer.width) if active[:, i].all()])
    np.testing.assert_allclose(layer.active_ratio, active.mean())
    np.testing.assert_allclose(layer.nonzero_ratio, (kept != 0).mean())
    np.testing.assert_allclose(layer.frequency, active.mean(0))
    np.testing.assert_allclose(layer.mean, kept.mean(0), rtol=1e-5, atol=1e-6)
    ratio = active.mean(1)
    for bound in (0.0, 0.05, 0.3, 0.5, 1.0):
        assert layer.fraction_of_inputs_below(bound) == pytest.approx((ratio < bound).mean())
    np.testing.assert_allclose(
        layer.cumulative, [(ratio <= k / layer.width + 1e-9).mean() for k in range(layer.width + 1)]
    )


def with_dead_and_busy_neurons(params):
    """Neuron 0 of layer 1 never fires, neurons 1 and 2 always do."""
    bias = params["layers_1"]["mlp"]["up"]["bias"].at[:3].set(jnp.array([-1e3, 1e3, 1e3]))
    layer = params["layers_1"]
    up = {**layer["mlp"]["up"], "bias": bias}
    return {**params, "layers_1": {**layer, "mlp": {**layer["mlp"], "up": up}}}


@pytest.fixture(scope="module")
def measured():
    model = transformer()
    params = model.init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))
    params = with_dead_and_busy_neurons(params)
    return model, params, measure(model, params, batches())


def test_counts_equal_numpys(measured):
    model, params, statistics = measured
    assert [layer.name for layer in statistics.layers] == [f"layers_{i}/mlp/act" for i in range(LAYERS)]
    for layer in statistics.layers:
        assert_counts(layer, kept_activations(model, params, layer.name))
    layer = statistics["layers_1/mlp/act"]
    assert 0 in layer.dead and {1, 2} <= set(layer.always_on)
    assert layer.ever_active == 1 - len(layer.dead) / F


def test_scanned_layers_count_the_same(measured):
    _, params, statistics = measured
    scanned = measure(transformer(scan=True), stack_layers(params), batches())
    assert [layer.name for layer in scanned.layers] == [layer.name for layer in statistics.layers]
    for one, two in zip(scanned.layers, statistics.layers):
        np.testing.assert_array_equal(one.active, two.active)
        np.testing.assert_array_equal(one.histogram, two.histogram)
        np.testing.assert_allclose(one.total, two.total, rtol=1e-4, atol=1e-5)


def test_patterns_of_layers_keep_their_own_widths():
    pattern = (Layer(mlp=MLP(8, "relu")), Layer(mlp=GatedMLP(20, "relu")))
    flat, scanned = transformer(pattern=pattern), transformer(pattern=pattern, scan=True)
    params = flat.init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))
    found = [measure(flat, params, batches()), measure(scanned, stack_layers(params, 2), batches())]
    for statistics in found:
        assert [layer.width for layer in statistics.layers] == [8, 20, 8, 20]
        assert [layer.name for layer in statistics.layers] == [f"layers_{i}/mlp/act" for i in range(LAYERS)]
    for one, two in zip(found[0].layers, found[1].layers):
        np.testing.assert_array_equal(one.active, two.active)


def test_encoder_and_decoder_count_their_own_tokens():
    model = transformer(kind="encoder-decoder", layers=2)

    def pairs():
        for batch in batches(2):
            target = {"decoder_tokens": batch["tokens"][:, :5], "decoder_segments": batch["segments"][:, :5]}
            yield {**batch, **target}

    params = model.init(jax.random.key(0), **{k: jnp.asarray(v) for k, v in next(pairs()).items()})
    statistics = measure(model, params, pairs())
    for layer in statistics.layers:
        key = "decoder_segments" if layer.name.startswith("decoder/") else "segments"
        assert layer.tokens == sum(int((batch[key] > 0).sum()) for batch in pairs())
    assert len(statistics.layers) == 4


def test_whole_is_the_sum_of_its_parts(measured):
    model, params, whole = measured
    parts = [measure(model, params, [batch]) for batch in batches()]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for one, two in zip(merged.layers, whole.layers):
        np.testing.assert_array_equal(one.active, two.active)
        np.testing.assert_array_equal(one.histogram, two.histogram)
        np.testing.assert_array_equal(one.total, two.total)
    with pytest.raises(InputError, match="do not add"):
        parts[0].merge(ActivationStatistics(parts[0].layers[:2]))


def test_pooled_over_layers(measured):
    model, params, statistics = measured
    kept = [kept_activations(model, params, layer.name) for layer in statistics.layers]
    ratio = np.concatenate([(each > 0).mean(1) for each in kept])
    np.testing.assert_allclose(
        statistics.active_ratio, np.concatenate([(each > 0).ravel() for each in kept]).mean()
    )
    for bound in (0.05, 0.4, 0.5):
        assert statistics.fraction_of_inputs_below(bound) == pytest.approx((ratio < bound).mean())
    grid = np.linspace(0, 1, 11)
    np.testing.assert_allclose(statistics.cumulative(grid), [(ratio <= x + 1e-12).mean() for x in grid])
    assert statistics.cumulative(np.array([1.0])) == 1.0
    assert statistics.dead == sum(len(layer.dead) for layer in statistics.layers) >= 1
    assert statistics.ever_active == pytest.approx(1 - statistics.dead / (F * LAYERS))
    row = statistics.rows()[1]
    assert row["layer"] == "layers_1/mlp/act" and row["dead"] >= 1 and "inputs below 5%" in row


def test_a_threshold_counts_larger_activations_only(measured):
    model, params, _ = measured
    name = "layers_2/mlp/act"
    statistics = measure(model, params, batches(), names="layers_2/mlp/act", threshold=0.1)
    assert len(statistics.layers) == 1
    assert_counts(statistics[name], kept_activations(model, params, name), threshold=0.1)


def test_rows_that_only_fill_the_batch_do_not_count(measured):
    model, params, _ = measured
    batch = next(batches(1))
    weight = np.array([1, 1, 0, 1], np.float32)
    found = measure(model, params, [{**batch, "weight": weight}])
    rows = {key: value[weight > 0] for key, value in batch.items()}
    wanted = measure(model, params, [rows])
    for one, two in zip(found.layers, wanted.layers):
        assert one.tokens == two.tokens
        np.testing.assert_array_equal(one.active, two.active)


def test_activations_are_never_kept(measured):
    """What leaves the program does not grow with the batch, and the program is traced once per shape."""
    model, params, _ = measured
    traces = []

    def inputs(batch):
        traces.append(batch["tokens"].shape)
        return (batch["tokens"],), {"segments": batch["segments"]}

    measure(model, params, [*batches(3), *batches(2, rows=2)], inputs=inputs)
    assert traces == [(4, 7), (2, 7)]


def test_any_linen_model_and_any_site():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            hidden = Hook(name="neurons")(nn.relu(nn.Dense(12, name="up")(images)))
            return nn.Dense(3)(hidden)

    draw = np.random.default_rng(1)
    images = draw.normal(size=(50, 6)).astype(np.float32)
    model = Net()
    params = model.init(jax.random.key(0), images)["params"]
    statistics = measure(
        model,
        params,
        [{"images": images[:30]}, {"images": images[30:]}],
        names=["neurons", "up"],
        inputs=lambda batch: ((batch["images"],), {}),
        real=lambda batch, path: jnp.ones(batch["images"].shape[:1], bool),
    )
    kept = np.maximum(images @ params["up"]["kernel"] + params["up"]["bias"], 0)
    assert_counts(statistics["neurons"], kept)
    np.testing.assert_array_equal(statistics["up"].active, (kept > 0).sum(0))
    assert statistics["up"].nonzero == 50 * 12


def test_what_cannot_be_measured_is_an_error(measured):
    model, params, statistics = measured
    with pytest.raises(InputError, match="matches no site"):
        measure(model, params, batches(), names="mlp/acts")
    with pytest.raises(InputError, match="no batches"):
        measure(model, params, [])
    with pytest.raises(InputError, match="no token of any batch counts"):
        measure(model, params, [{**batch, "segments": batch["segments"] * 0} for batch in batches(1)])
    with pytest.raises(InputError, match="a batch needs 'tokens'"):
        measure(model, params, [{"images": np.zeros(3)}])
    with pytest.raises(InputError, match="no statistics of 'x'; there are layers_0/mlp/act"):
        statistics["x"]
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["layers_2"]["mlp"]["up"]["bias"] = jnp.full(F, jnp.nan)
    with pytest.raises(InputError, match="layers_2/mlp/act: activations are not finite"):
        measure(model, broken, batches(1))


def test_a_file_holds_everything(measured, tmp_path):
    *_, statistics = measured
    path = save_statistics(tmp_path / "activations.safetensors", statistics)
    loaded = load_statistics(path)
    assert loaded.threshold == statistics.threshold
    for one, two in zip(loaded.layers, statistics.layers, strict=True):
        assert (one.name, one.tokens, one.nonzero) == (two.name, two.tokens, two.nonzero)
        for key in ("active", "total", "histogram"):
            assert getattr(one, key).dtype == getattr(two, key).dtype
            np.testing.assert_array_equal(getattr(one, key), getattr(two, key))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file") as caught:
        load_statistics(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        load_statistics(tmp_path / "none")


def test_counts_of_many_batches_do_not_wrap(measured):
    """2**31 is passed by adding results, which are 64-bit."""
    *_, statistics = measured
    for _ in range(36):
        statistics = statistics.merge(statistics)
    layer = statistics["layers_1/mlp/act"]
    assert layer.tokens > 2**40 and layer.active[1] == layer.tokens
    assert layer.histogram.sum() == layer.tokens
