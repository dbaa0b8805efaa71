"""Positions: rotary, sinusoidal, learned, and the biases of T5 and ALiBi."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    MLP,
    ALiBi,
    Learned,
    Positions,
    RelativeBuckets,
    Rotary,
    Sinusoidal,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
)
from modicum.models.kernels import DenseBias

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7))
CONFIG = TransformerConfig(layers=1, width=8, vocab=11, attention=multi_head(2), mlp=MLP(8), precision=FP64)


def rotate(choice, vector, position):
    """`vector` `[K]` at `position`."""
    return np.asarray(choice.rotate(jnp.asarray(vector)[None, None, None], jnp.asarray([[position]])))[
        0, 0, 0
    ]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [0, 4])
def test_rotated_scores_depend_on_the_distance_only(width, interleaved, x64):
    """(R_m q)·(R_n k) = q·(R_{n-m} k), and |R_m q| = |q| (Su et al., "RoFormer", 2021, equation 16)."""
    choice = Rotary(width=width, interleaved=interleaved)
    query, key = np.random.default_rng(1).normal(size=(2, 8))
    for m, n in [(0, 0), (0, 5), (3, 3), (7, 2), (1000, 1003), (5, 100_000)]:
        score = rotate(choice, query, m) @ rotate(choice, key, n)
        np.testing.assert_allclose(score, query @ rotate(choice, key, n - m), rtol=0, atol=1e-10)
        length = np.linalg.norm(rotate(choice, query, m))
        np.testing.assert_allclose(length, np.linalg.norm(query), rtol=1e-13)
    near, far = (query @ rotate(choice, key, n) for n in (1, 2))
    assert abs(near - far) > 1e-3  # it does depend on the distance


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_papers_block_matrix(interleaved, x64):
    base, width, position = 100.0, 6, 3
    matrix = np.zeros((width, width))
    for pair in range(width // 2):
        angle = position * base ** (-2 * pair / width)
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    vector = np.random.default_rng(2).normal(size=width + 2)
    rotated = rotate(Rotary(base, width, interleaved), vector, position)
    np.testing.assert_allclose(rotated[:width], matrix @ vector[:width], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(rotated[width:], vector[width:])


@pytest.mark.parametrize("width", [3, 10])
def test_a_rotary_width_that_does_not_fit_is_an_error(width):
    with pytest.raises(InputError, match=f"rotary width {width} must be even and at most the head width 8"):
        Rotary(width=width).rotate(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1), int))


def test_rotation_in_half_precision_keeps_float32_angles():
    vector = np.random.default_rng(3).normal(size=8).astype(np.float32)
    exact = rotate(Rotary(), vector, 2001)
    half = rotate(Rotary(), vector.astype(jnp.bfloat16), 2001).astype(np.float32)
    np.testing.assert_allclose(half, exact, rtol=0, atol=0.03)  # angles in bfloat16 would be off by radians


def embedded(config, params, tokens=TOKENS, **kwargs):
    model = Transformer(config)
    return run_with_cache(model, params, tokens, names=["embedded"], **kwargs)[1]["embedded"]


def test_sinusoidal_embedding_is_its_formula(random_parameters, x64):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(p / 10000^(2i/D))."""
    config = replace(CONFIG, positions=Sinusoidal(), embedding_scale=0.0)
    params = random_parameters(Transformer(config), TOKENS)
    encoding = np.zeros((7, 8))
    for p in range(7):
        for i in range(4):
            angle = p / 10_000 ** (2 * i / 8)
            encoding[p, 2 * i], encoding[p, 2 * i + 1] = np.sin(angle), np.cos(angle)
    words = params["embedding"]["table"][TOKENS] * np.sqrt(8)
    np.testing.assert_allclose(embedded(config, params), words + encoding, rtol=0, atol=1e-14)


def test_learned_positions_are_looked_up(random_parameters, x64):
    config = replace(CONFIG, positions=Learned(9))
    params = random_parameters(Transformer(config), TOKENS)
    places = np.asarray([[0, 1, 2, 0, 1, 0, 1], [8, 7, 6, 5, 4, 3, 2]])
    expected = params["embedding"]["table"][TOKENS] + params["position_embedding"]["table"][places]
    np.testing.assert_allclose(embedded(config, params, positions=places), expected, rtol=0, atol=1e-14)


def test_more_tokens_than_learned_positions_are_an_error(x64):
    model = Transformer(replace(CONFIG, positions=Learned(6)))
    with pytest.raises(InputError, match="sequence length 7 exceeds the model's 6 positions") as error:
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert "\n" not in str(error.value)


class GivenBias(Positions):
    """Adds a written-out bias `[1, H, T, T]`, to compare with."""

    values: np.ndarray

    def bias(self, heads, bidirectional, precision, std):
        return lambda queries, keys, offset: DenseBias(jnp.asarray(self.values))


def given(values):
    choice = GivenBias()
    object.__setattr__(choice, "values", values)
    return choice


def t5_bucket(distance, bidirectional, buckets, max_distance):
    """Raffel et al.'s mapping of key - query to a bucket, in plain Python."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    spread = np.log(distance / exact) / np.log(max_distance / exact) * (buckets - exact)
    return first + min(exact + int(spread), buckets - 1)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_relative_buckets_are_a_dense_bias(kind, random_parameters, x64):
    config = replace(CONFIG, kind=kind, positions=RelativeBuckets(8, 6))
    params = random_parameters(Transformer(config), TOKENS, std=1.0)
    table = params["relative_bias"]["table"]
    assert table.shape == (8, 2)
    bucket = [[t5_bucket(key - query, kind == "encoder", 8, 6) for key in range(7)] for query in range(7)]
    dense = replace(config, positions=given(table[np.asarray(bucket)].transpose(2, 0, 1)[None]))
    assert_same(config, dense, params)


def test_alibi_is_a_dense_bias(random_parameters, x64):
    config = replace(CONFIG, positions=ALiBi())
    params = random_parameters(Transformer(config), TOKENS, std=1.0)
    assert "relative_bias" not in params
    slopes = np.asarray([2**-4, 2**-8])  # 2^(-8 i / H) for H = 2
    distance = np.abs(np.arange(7)[:, None] - np.arange(7))
    assert_same(config, replace(config, positions=given(-slopes[None, :, None, None] * distance)), params)


def assert_same(config, other, params):
    logits, expected = (jax.jit(Transformer(each).apply)(params, TOKENS) for each in (config, other))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    without = jax.jit(Transformer(replace(config, positions=Positions())).apply)(params, TOKENS)
    assert np.abs(logits - without).max() > 1e-3


def test_an_encoder_decoder_has_a_table_of_buckets_for_each_stack(x64):
    config = replace(CONFIG, kind="encoder-decoder", positions=RelativeBuckets(8, 6))
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS, decoder_tokens=TOKENS)
    for stack in ("encoder", "decoder"):
        assert tree[stack]["relative_bias"]["table"].shape == (8, 2)
