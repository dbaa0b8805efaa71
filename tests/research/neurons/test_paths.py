"""Effects along the stream alone: they add up, equal the run made by hand, and find what was planted."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    GatedMLP,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
    run_with_edits,
    stack_layers,
)
from modicum.models.norms import LayerNorm, RMSNorm
from modicum.models.residuals import NormedResidual, PostNorm, PreNorm
from modicum.research.neurons import ablate_each, direct_effects, patch_each, patch_paths

pytestmark = pytest.mark.usefixtures("quick_compile")

CLEAN, CORRUPTED = np.asarray([[3, 1, 4, 1], [5, 2, 6, 0]]), np.asarray([[3, 2, 4, 1], [5, 2, 6, 4]])
PLAIN = TransformerConfig(
    layers=3,
    width=8,
    vocab=7,
    attention=multi_head(2, bias=False),
    mlp=GatedMLP(6),
    norm=RMSNorm(),
)


def random(model, seed=0):
    numbers = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), CLEAN)
    return jax.tree.map(lambda leaf: numbers.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


def difference(logits):
    return (logits[:, -1, 2] - logits[:, -1, 5]).sum()


@pytest.mark.parametrize(
    "residual", [PreNorm(), PostNorm(), NormedResidual(2.0)], ids=lambda r: type(r).__name__
)
def test_direct_effects_add_up_to_the_metric(residual):
    """Without biases every logit is a sum of what embedding, heads and neurons add to the stream."""
    config = replace(PLAIN, residual=residual)
    model, scanned = Transformer(config), Transformer(replace(config, scan=True))
    params, names = random(model), ["embedded", "attention/heads", "mlp/mid", "attention", "mlp"]
    last = "layers_2/mlp_norm" if isinstance(residual, PostNorm) else "final_norm"

    def effects(model, params):
        found = direct_effects(model, params, CLEAN, names=[*names, last], metric=difference)
        return found, difference(model.apply(params, CLEAN))

    found, whole = jax.jit(lambda p: effects(model, p))(params)
    total = {name: sum(v.sum() for path, v in found.items() if path.endswith(name)) for name in names}
    assert total["embedded"] + total["attention"] + total["mlp"] == pytest.approx(float(whole), rel=1e-3)
    assert found[last].sum() == pytest.approx(float(whole), rel=1e-3)
    assert total["attention/heads"] == pytest.approx(float(total["attention"]), rel=1e-3)
    assert total["mlp/mid"] == pytest.approx(float(total["mlp"]), rel=1e-3)
    assert not found["layers_1/mlp/mid"][:, :-1].any()  # other positions speak through attention alone
    if isinstance(residual, PreNorm):
        stacked, _ = jax.jit(lambda p: effects(scanned, p))(stack_layers(params))
        for layer in range(3):
            own = found[f"layers_{layer}/mlp/mid"]
            np.testing.assert_allclose(stacked["layers/mlp/mid"][layer], own, atol=1e-4)


def test_a_direct_effect_is_what_the_units_row_says_to_the_normalised_stream():
    config = replace(PLAIN, norm=LayerNorm(), mlp=MLP(6, "gelu"), tied=False)
    model = Transformer(config)
    params = random(model)

    @jax.jit
    def both(params):
        found = direct_effects(model, params, CLEAN, names=["layers_0/mlp/act"], metric=difference)
        return found, run_with_cache(model, params, CLEAN, names=["layers_0/mlp/act", "layers_2/residual"])[1]

    found, seen = both(params)
    act, stream = np.asarray(seen["layers_0/mlp/act"])[:, -1], np.asarray(seen["layers_2/residual"])[:, -1]
    size = np.sqrt(stream.var(-1, keepdims=True) + config.norm.epsilon)
    rows = params["layers_0"]["mlp"]["down"]["kernel"]
    rows = (rows - rows.mean(-1, keepdims=True)) * params["final_norm"]["scale"]
    wanted = params["head"]["kernel"][:, 2] - params["head"]["kernel"][:, 5]
    np.testing.assert_allclose(found["layers_0/mlp/act"][:, -1], act * (rows @ wanted) / size, atol=1e-4)


@pytest.fixture(scope="module")
def planted():
    """Neuron 0 of layer 0 writes where neuron 3 of layer 1 alone reads, neuron 1 where a logit does."""
    config = replace(PLAIN, layers=2, mlp=MLP(6, "relu", bias=False), norm=RMSNorm(), tied=False)
    model = Transformer(config)
    params = jax.tree.map(np.zeros_like, random(model))
    params["embedding"]["table"] = np.eye(7, 8, dtype=np.float32)
    for name in ("layers_0", "layers_1"):
        for norm in ("attention_norm", "mlp_norm"):
            params[name][norm]["scale"] += 1
    params["final_norm"]["scale"] += 1
    first, second = (params[name]["mlp"] for name in ("layers_0", "layers_1"))
    first["up"]["kernel"][[1, 1], [0, 1]] = 1  # both fire at word 1
    first["down"]["kernel"][[0, 1], [6, 7]] = 1
    second["up"]["kernel"][6, 3] = second["down"]["kernel"][3, 5] = 1
    params["head"]["kernel"][[5, 7], [2, 2]] = 1
    return model, params


def logit(logits):
    return logits[0, 1, 2]


def test_who_speaks_to_the_logits_and_who_through_another_is_told_apart(planted):
    model, params = planted

    @jax.jit
    def told(params):
        given = {"metric": logit, "axis": -1}
        direct = direct_effects(model, params, CLEAN, names=["layers_0/mlp/act"], metric=logit)
        ablated = ablate_each(model, params, CLEAN, name="layers_0/mlp/act", metric=logit)
        paths = [
            patch_paths(model, params, CLEAN, CORRUPTED, sender="layers_0/mlp/act", receivers=[to], **given)
            for to in ("layers_1/mlp/up", "final_norm", "layers_1/(mlp/up|attention/query)")
        ]
        both = patch_each(model, params, CLEAN, CORRUPTED, name="layers_0/mlp/act", **given)
        start = logit(model.apply(params, CORRUPTED))
        whole = logit(model.apply(params, CLEAN))
        return direct["layers_0/mlp/act"][0, 1], whole - ablated, [each - start for each in (*paths, both)]

    direct, lost, (through, straight, either, both) = jax.tree.map(np.asarray, told(params))
    assert lost[0] > 0.1 and lost[1] > 0.1  # the model needs both
    assert direct[1] > 0.1 and not np.delete(direct, 1).any()
    assert through[0] > 0.1 and not np.delete(through, 0).any()
    assert straight[1] > 0.1 and np.abs(np.delete(straight, [0, 1])).max() == 0
    np.testing.assert_allclose(either, through, atol=1e-6)
    assert both[0] > 0.1 and both[1] > 0.1


def test_a_path_is_the_two_runs_made_by_hand():
    model = Transformer(replace(PLAIN, mlp=MLP(6, "gelu"), norm=LayerNorm()))
    params, sender, to = random(model), "layers_0/attention/heads", "layers_2/attention/query"

    @jax.jit
    def by_hand(params):
        clean = run_with_cache(model, params, CLEAN, names=[sender])[1][sender]
        names = ["layers_0/mlp", "layers_1/attention", "layers_1/mlp"]
        held = run_with_cache(model, params, CORRUPTED, names=names)[1]
        edits = {path: lambda x, value=value: value for path, value in held.items()}
        edits[sender] = lambda x: x.at[:, :, 1].set(clean[:, :, 1])
        seen = run_with_cache(model, params, CORRUPTED, names=[to, "layers_1/mlp"], edits=edits)[1]
        return run_with_edits(model, params, CORRUPTED, edits={to: lambda x: seen[to]}), seen, held

    @jax.jit
    def found(params):
        return patch_paths(
            model,
            params,
            CLEAN,
            CORRUPTED,
            sender=sender,
            receivers=[to],
            metric=lambda y: y,
            axis=2,
            chunk=1,
        )

    expected, seen, held = by_hand(params)
    np.testing.assert_array_equal(seen["layers_1/mlp"], held["layers_1/mlp"])  # what is read is the edited
    heads = found(params)
    assert heads.shape == (2, 2, 4, 7)
    np.testing.assert_allclose(heads[1], expected, atol=1e-4)
    plain = jax.jit(model.apply)(params, CORRUPTED)
    assert np.abs(heads[1] - plain).max() > 1e-3


def test_what_cannot_be_told_is_said():
    with pytest.raises(InputError, match="Dense is not a Transformer of ours"):
        direct_effects(nn.Dense(3), {}, CLEAN, names=["mlp"], metric=difference)
    with pytest.raises(InputError, match="must have one shape"):
        patch_paths(
            Transformer(PLAIN),
            {},
            CLEAN,
            CLEAN[:1],
            sender="mlp",
            receivers=["head"],
            metric=difference,
            axis=1,
        )
    two = Transformer(replace(PLAIN, layers=2))
    with pytest.raises(InputError, match="receiver 'layers_1/mlp' is what a layer puts out, which is held"):
        jax.eval_shape(
            lambda params: patch_paths(
                two,
                params,
                CLEAN,
                CORRUPTED,
                sender="layers_0/mlp/mid",
                receivers=["layers_0/mlp", "layers_1/mlp"],
                metric=difference,
                axis=-1,
            ),
            random(two),
        )
    with pytest.raises(InputError, match="'mlp/nothing' matches no site"):
        run_with_cache(Transformer(PLAIN), random(Transformer(PLAIN)), CLEAN, names=["mlp"],
                       edits={"mlp/nothing": jnp.negative})  # fmt: skip
