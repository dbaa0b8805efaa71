"""Activation functions as they are written in commands, and put into a configuration."""

import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, FATReLU, GatedMLP, Layer, RoutedMLP, StatisticalTopK, TopK, TransformerConfig
from modicum.models.activations import EXAMPLES, SILENCING, change_activation, neurons_of, parse_activation
from modicum.models.mlp import ACTIVATIONS, activate


def test_every_activation_has_a_spelling():
    wanted = {"fatrelu:0.1": FATReLU(0.1), "topk:32": TopK(32), "statistical-topk:32": StatisticalTopK(32)}
    assert {text: parse_activation(text) for text in EXAMPLES} == wanted
    for name in (*ACTIVATIONS, "drelu"):
        assert parse_activation(name) == name
    assert parse_activation("topk:7", SILENCING) == TopK(7)


def test_those_that_silence_neurons_do():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)))
    for text in SILENCING:
        values = activate(parse_activation("relu" if text == "drelu" else text), x)
        assert (np.asarray(values) == 0).mean() > 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gulu", "activation 'gulu' is unknown; valid: relu, relu2, gelu,.* drelu, fatrelu:0.1, topk:32"),
        ("topk", "activation 'topk' is unknown; valid: .*topk:32"),
        ("relu:3", "activation 'relu:3' is unknown"),
        ("topk:3.5", "activation 'topk:3.5': '3.5' is no whole number; topk:32 is valid"),
        ("fatrelu:x", "activation 'fatrelu:x': 'x' is no number; fatrelu:0.1 is valid"),
        ("fatrelu:inf", "FATReLU threshold=inf must be at least 0 and finite"),
        ("topk:0", "top-k: k=0 must be at least 1"),
        ("fatrelu:-1", "FATReLU threshold=-1.0 must be at least 0 and finite"),
    ],
)
def test_what_is_no_activation_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_activation(text)
    with pytest.raises(InputError, match="activation 'silu' is unknown; valid: relu, relu2, drelu, fatrelu"):
        parse_activation("silu", SILENCING)


def test_every_layer_changes_and_others_are_refused():
    config = TransformerConfig(layers=2, mlp=MLP(8), pattern=(Layer(), Layer(mlp=GatedMLP(8))))
    changed = change_activation(config, TopK(2))
    assert [changed.layer(i)[1].activation for i in (0, 1)] == [TopK(2), TopK(2)]
    with pytest.raises(InputError, match="ReLU on both products of a gated layer; this one is plain"):
        change_activation(config, "drelu")
    with pytest.raises(InputError, match="mlp is a RoutedMLP; an MLP or a GatedMLP can be changed"):
        change_activation(TransformerConfig(mlp=RoutedMLP(2, 2)), "relu")
    assert (neurons_of("drelu"), neurons_of(TopK(2))) == ("mlp/mid", "mlp/act")
