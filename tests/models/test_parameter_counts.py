"""Parameter counts against the published ones; shapes only, nothing is allocated."""

from dataclasses import replace

import jax
import pytest

from modicum.models import (
    ClassifierHead,
    ExtendedHead,
    LanguageModelHead,
    Transformer,
    TransformerConfig,
    multi_head,
    preset,
)
from modicum.models.costs import abstract_parameters as abstract
from modicum.models.costs import matrix_weights, parameter_bytes, parameter_count
from modicum.research import delta

# Largest relative distance of a rung's count from its name. The small rungs are far from theirs because
# the talk's names count 12 L D² roughly and leave the 50,257-word table out.
LADDER = {
    "ladder-0.3b": (0.3e9, 0.19),
    "ladder-1b": (1e9, 0.32),
    "ladder-3b": (3e9, 0.02),
    "ladder-7b": (7e9, 0.07),
    "ladder-10b": (10e9, 0.02),
    "ladder-20b": (20e9, 0.05),
    "ladder-25b": (25e9, 0.09),
    "ladder-60b": (60e9, 0.03),
    "ladder-175b": (175e9, 0.005),
}


def count(name: str) -> int:
    return parameter_count(Transformer(replace(preset(name), scan=True)))  # as many as unrolled


def test_gpt2_small_has_exactly_the_published_parameters():
    assert parameter_count(Transformer(preset("gpt2"))) == 124_439_808


@pytest.mark.parametrize(
    "name, published",
    [("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_larger_gpt2_have_exactly_their_checkpoints_parameters(name, published):
    assert count(name) == published


@pytest.mark.parametrize(
    "name, head, published",
    [
        ("cpm-ant-10b", LanguageModelHead(), 9_391_624_192),
        ("cpm-bee-10b", ExtendedHead(), 9_616_080_896),
        ("chatglm-6b", LanguageModelHead(), 6_173_286_400),
    ],
)
def test_models_of_billions_have_exactly_the_published_parameters(name, head, published):
    assert parameter_count(Transformer(preset(name), head)) == published


def test_lora_on_cpm_ant_has_the_published_size():
    """6.3 million: rank 8 on the queries and values of 48 layers, 0.067% of its 9.39 billion."""
    model = Transformer(preset("cpm-ant-10b"))
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    tuned = delta.attach(model, {"attention/(query|value)": delta.LoRA(rank=8)})
    params = abstract(model)
    variables = jax.eval_shape(lambda p, t: tuned.init(jax.random.key(0), p, t), params, tokens)
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["delta"])]
    assert sum(sizes) == 6_291_456 == 48 * 2 * 8 * (4096 + 4096)
    assert sum(sizes) / 9_391_624_192 == pytest.approx(0.00067, rel=0.01)


def test_gpt3_is_within_half_a_percent_of_its_name():
    assert count("gpt3-175b") == pytest.approx(175e9, rel=0.005)


def test_gpt1_and_the_base_transformer():
    assert count("gpt1") == pytest.approx(116.5e6, rel=0.001)
    assert 50e6 < count("transformer-base") < 100e6  # the talk says above 100M; only the big one is
    assert count("transformer-big") > 100e6
    assert count("transformer-base") == pytest.approx(65e6, rel=0.05)  # Vaswani et al. 2017, table 3
    assert count("transformer-big") == pytest.approx(213e6, rel=0.02)


def test_gpt1_gpt2_gpt3_grow_by_tens():
    billions = [count(name) / 1e9 for name in ("gpt1", "gpt2-xl", "gpt3-175b")]
    assert billions == pytest.approx([0.1, 1.5, 175], rel=0.2)


@pytest.mark.parametrize("name", LADDER)
def test_every_rung_of_the_ladder_is_near_its_name(name):
    said, distance = LADDER[name]
    real = count(name)
    print(f"{name}: {real:,} parameters, {real / said - 1:+.1%}")
    assert real == pytest.approx(said, rel=distance)


def test_96_layers_of_width_2048_are_billions_though_width_squared_times_layers_is_hundreds_of_millions():
    layers, width = 96, 2048
    config = TransformerConfig(layers=layers, width=width, attention=multi_head(16), scan=True)
    real = parameter_count(Transformer(config))
    print(f"L=96, D=2048: {real:,} parameters; D² L = {width**2 * layers:,}")
    assert 100e6 < width**2 * layers < 1e9
    assert real == pytest.approx(12 * width**2 * layers, rel=0.03)
    assert real > 4e9


def test_a_scanned_model_has_as_many_parameters_as_an_unrolled_one():
    config = preset("gpt2")
    scanned = replace(config, scan=True)
    assert parameter_count(Transformer(scanned)) == parameter_count(Transformer(config))
    assert matrix_weights(scanned) == matrix_weights(config)


def test_what_is_counted_beside_the_layers():
    config = TransformerConfig(layers=1, width=8, vocab=30, attention=multi_head(2), tied=False)
    tied = TransformerConfig(layers=1, width=8, vocab=30, attention=multi_head(2), tied=True)
    assert parameter_count(Transformer(config)) - parameter_count(Transformer(tied)) == 8 * 30
    labels = Transformer(tied, ClassifierHead(3))
    assert parameter_count(labels) - parameter_count(Transformer(tied)) == 8 * 3 + 3
    assert parameter_bytes(abstract(labels)) == 4 * parameter_count(labels)
