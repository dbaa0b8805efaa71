"""A feed-forward layer in experts is the dense layer where all are chosen, and less of it where some are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    CentreSelection,
    GatedMLP,
    GroupedQuery,
    LowRankSelection,
    MLPSelection,
    MoefiedMLP,
    OracleSelection,
    Transformer,
    TransformerConfig,
    run_with_cache,
    stack_layers,
)
from modicum.models.costs import matrix_weights
from modicum.models.generation import generate
from modicum.parallel.rules import axis_names
from modicum.research.training.model_folder import load_model, save_model

pytestmark = pytest.mark.usefixtures("quick_compile")

F, E, D = 24, 6, 16
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 5)).astype(np.int32)


def transformer(mlp, **options):
    given = {"layers": 2, "width": D, "vocab": 40, "attention": GroupedQuery(2), "mlp": mlp}
    return Transformer(TransformerConfig(**{**given, **options}))


def moefied(**options):
    return MoefiedMLP(**{"width": F, "experts": E, "chosen": E, **options})


def cut(params, experts=E):
    """The parameters of a dense model as those of contiguous experts, without `selection`."""

    def layer(mlp):
        found = {}
        for name, linear in mlp.items():
            kernel = linear["kernel"] if name == "down" else linear["kernel"].T
            found[name] = kernel.reshape(experts, -1, D)
            if "bias" in linear:
                found[f"{name}_bias"] = (
                    linear["bias"] if name == "down" else linear["bias"].reshape(experts, -1)
                )
        return {"experts": found}

    return {k: {**v, "mlp": layer(v["mlp"])} if k.startswith("layers_") else v for k, v in params.items()}


@pytest.mark.parametrize("dense", [MLP(F, "relu"), GatedMLP(F, "silu", bias=True)], ids=["plain", "gated"])
def test_with_all_experts_it_is_the_dense_layer(dense, random_parameters):
    model = transformer(dense)
    params = random_parameters(model, TOKENS)
    gated = isinstance(dense, GatedMLP)
    kind = {"activation": dense.activation, "gated": gated, "selection": OracleSelection()}
    whole = transformer(moefied(**kind, impl="gather"))
    np.testing.assert_allclose(
        whole.apply(cut(params), TOKENS), model.apply(params, TOKENS), rtol=1e-4, atol=1e-4
    )
    part = transformer(
        moefied(chosen=1, activation=dense.activation, gated=gated, selection=OracleSelection())
    )
    assert np.abs(part.apply(cut(params), TOKENS) - model.apply(params, TOKENS)).max() > 0.1


@pytest.mark.parametrize(
    "selection",
    [OracleSelection(), CentreSelection("distance"), CentreSelection(), MLPSelection(), LowRankSelection(3)],
    ids=lambda choice: type(choice).__name__ + getattr(choice, "measure", ""),
)
def test_the_experts_with_the_highest_scores_are_chosen(selection, random_parameters):
    model = transformer(moefied(chosen=2, selection=selection))
    params = random_parameters(model, TOKENS)
    names = ["layers_0/mlp/selection", "layers_0/mlp/chosen", "layers_0/mlp_norm"]
    _, seen = run_with_cache(model, params, TOKENS, names=names)
    scores, chosen, x = (np.asarray(seen[name], np.float64) for name in names)
    expected = own_scores(selection, params["layers_0"]["mlp"], x)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(expected)[..., -2:]))


def own_scores(selection, params, x):
    direction = x / np.linalg.norm(x, axis=-1, keepdims=True)
    own = {name: np.asarray(leaf, np.float64) for name, leaf in params.get("selection", {}).items()}
    match selection:
        case OracleSelection():
            experts = {name: np.asarray(leaf, np.float64) for name, leaf in params["experts"].items()}
            return np.maximum(np.einsum("btd,end->bten", x, experts["up"]) + experts["up_bias"], 0).sum(-1)
        case CentreSelection("distance"):
            return 1 - np.square(direction[..., None, :] - own["centres"]).sum(-1)
        case CentreSelection():
            return direction @ (own["centres"] / np.linalg.norm(own["centres"], axis=1, keepdims=True)).T
        case MLPSelection():
            return np.tanh(direction @ own["first"]) @ own["second"] + own["bias"]
        case LowRankSelection():
            return direction @ own["first"] @ own["second"] + own["bias"]


def test_a_converted_model_is_stored_and_generates(tmp_path, random_parameters):
    model = transformer(moefied(chosen=2))
    params = random_parameters(model, TOKENS)
    save_model(tmp_path / "model", model, params)
    loaded = load_model(tmp_path / "model")
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), params)
    made = generate(loaded.model, loaded.params, [[3, 4]], max_new_tokens=4)
    text = [3, 4, *made.tokens[0].tolist()]
    logits = model.apply(params, np.array([text], np.int32))[0, 1:-1, :40]
    assert np.argmax(logits, -1).tolist() == text[2:]


def test_it_scans_trains_and_has_named_axes(random_parameters):
    mlp = moefied(chosen=2, selection=CentreSelection("distance"))
    model, scanned = transformer(mlp), transformer(mlp, scan=True)
    params = random_parameters(model, TOKENS)
    np.testing.assert_allclose(
        scanned.apply(stack_layers(params), TOKENS), model.apply(params, TOKENS), rtol=1e-5, atol=1e-5
    )
    gradients = jax.grad(lambda p: jnp.square(model.apply(p, TOKENS)).mean())(params)["layers_0"]["mlp"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.any(gradients["experts"]["up"]) and not np.any(gradients["selection"]["centres"])
    names = axis_names(params, model.axes)["layers_1"]["mlp"]
    assert names["experts"]["up"] == ("experts", "mlp", "width")


def test_a_token_pays_for_chosen_experts_and_the_router():
    dense = matrix_weights(transformer(MLP(F, "relu")).config)
    choice = moefied(chosen=2, selection=MLPSelection())
    found = matrix_weights(transformer(choice).config)
    saved, router = 2 * 2 * F * D * 4 // 6, 2 * (D * E + E * E)
    assert found == dense - saved + router
    assert router == choice.selection.flops(D, E)


def test_what_cannot_be_is_named():
    with pytest.raises(InputError, match="chosen=7 of experts=6"):
        MoefiedMLP(24, 6, 7)
    with pytest.raises(InputError, match="25 neurons do not divide into 6 experts"):
        MoefiedMLP(25, 6, 2)
    with pytest.raises(InputError, match="64 neurons do not divide into 6 experts"):
        jax.eval_shape(transformer(moefied(width=0)).init, jax.random.key(0), TOKENS)
    with pytest.raises(InputError, match="measure='angle'"):
        CentreSelection("angle")
