"""A configuration that cannot be is an error where it is written, in one line."""

from dataclasses import FrozenInstanceError, replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import GroupedQuery, Layer, Precision, Transformer, TransformerConfig, multi_head
from modicum.models.precision import BF16, FP16, FP32, policy

CONFIG = TransformerConfig(layers=4, width=8, vocab=11, attention=multi_head(2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"width": -8}, "width=-8 must be at least 1"),
        ({"vocab": 0}, "vocab=0 must be at least 1"),
        ({"vocab_multiple": 0}, "vocab_multiple=0 must be at least 1"),
        ({"kind": "prefix"}, "kind='prefix' is not one of decoder, encoder, encoder-decoder"),
        ({"remat": "some"}, "remat='some' is not one of none, dots, mlp, middle, full, offload, nor runs"),
        ({"pattern": (Layer(),) * 3}, "4 layers are not a multiple of the pattern's 3"),
        ({"dropout": 1.0}, r"dropout=1.0 must be at least 0 and below 1"),
        ({"width": 9}, "width 9 is not a multiple of 2 heads; set head_width"),
        ({"pattern": (Layer(), Layer(multi_head(3)))}, "width 8 is not a multiple of 3 heads"),
    ],
)
def test_an_impossible_value_is_an_error_of_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        replace(CONFIG, **change)
    assert "\n" not in str(error.value)


def test_precisions_have_names():
    assert [policy(name) for name in ("fp32", "bf16", "fp16")] == [FP32, BF16, FP16]
    with pytest.raises(InputError, match="precision 'fp8' is unknown; valid: fp64, fp32, bf16, fp16"):
        policy("fp8")
    with pytest.raises(InputError, match="precision compute='int8' is not one of float64, float32"):
        Precision(compute="int8")


def test_float64_without_x64_is_an_error_and_not_float32():
    model = Transformer(replace(CONFIG, precision=policy("fp64")))
    with pytest.raises(InputError, match="precision float64 needs JAX_ENABLE_X64=1"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))


def test_an_encoder_decoder_asks_for_both_inputs():
    model = Transformer(replace(CONFIG, kind="encoder-decoder"))
    with pytest.raises(InputError, match="an encoder-decoder needs decoder_tokens"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))


def test_configurations_are_values():
    assert hash(CONFIG) == hash(replace(CONFIG)) and replace(CONFIG) == CONFIG
    with pytest.raises(FrozenInstanceError):
        CONFIG.layers = 3


def test_the_pattern_repeats_and_falls_back():
    odd = GroupedQuery(4, 1)
    config = replace(CONFIG, pattern=(Layer(), Layer(attention=odd)))
    assert [config.layer(index)[0] for index in range(4)] == [CONFIG.attention, odd] * 2
    assert config.layer(1)[1] == CONFIG.mlp


@pytest.mark.parametrize(
    "vocab, multiple, padded", [(11, 1, 11), (11, 8, 16), (16, 8, 16), (50_257, 128, 50_304)]
)
def test_the_vocabulary_is_padded_to_a_multiple(vocab, multiple, padded):
    assert replace(CONFIG, vocab=vocab, vocab_multiple=multiple).padded_vocab == padded
