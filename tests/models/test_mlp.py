"""Every feed-forward variant against its formula, written out in numpy."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import FP64, MLP, GatedMLP, Transformer, TransformerConfig, multi_head, run_with_cache

pytestmark = pytest.mark.usefixtures("quick_compile")

erf = np.vectorize(math.erf)
FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}
TOKENS = np.asarray([[1, 2, 3]])
CONFIG = TransformerConfig(layers=1, width=6, vocab=5, attention=multi_head(1), precision=FP64)


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_layer_is_its_formula(name, gated, bias, random_parameters, x64):
    choice = (GatedMLP if gated else MLP)(9, name, bias)
    model = Transformer(replace(CONFIG, mlp=choice))
    params = random_parameters(model, TOKENS, std=1.0)
    names = ["mlp_norm", "mlp", "mlp/act"]
    _, seen = run_with_cache(model, params, TOKENS, names=names)

    x, mlp = np.asarray(seen["layers_0/mlp_norm"]), params["layers_0"]["mlp"]
    assert ("bias" in mlp["up"]) == bias
    act = FORMULAS[name](dense(x, mlp["gate" if gated else "up"]))
    hidden = act * dense(x, mlp["up"]) if gated else act
    np.testing.assert_allclose(seen["layers_0/mlp/act"], act, rtol=0, atol=1e-14)
    np.testing.assert_allclose(seen["layers_0/mlp"], dense(hidden, mlp["down"]), rtol=0, atol=1e-12)


def test_no_activation_is_without_a_formula_here():
    from modicum.models.mlp import ACTIVATIONS

    assert set(FORMULAS) == set(ACTIVATIONS)


def test_width_0_is_four_times_the_models(x64):
    for choice, children in ((MLP(), {"up", "down"}), (GatedMLP(), {"gate", "up", "down"})):
        tree = jax.eval_shape(Transformer(replace(CONFIG, mlp=choice)).init, jax.random.key(0), TOKENS)
        mlp = tree["layers_0"]["mlp"]
        assert set(mlp) == children
        assert mlp["up"]["kernel"].shape == (6, 24)


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_a_bad_choice_is_an_error_when_it_is_made(kind):
    with pytest.raises(InputError, match="activation 'gulu' is unknown; valid: relu, relu2, gelu"):
        kind(8, "gulu")
    with pytest.raises(InputError, match="mlp width=-1"):
        kind(-1)
