"""The table of a configuration has the model's own counts, and Korthikanti's activations."""

from dataclasses import replace

import pytest

from modicum import InputError
from modicum.models import Transformer
from modicum.models.config import Layer, TransformerConfig
from modicum.models.costs import parameter_count, training_flops_per_token
from modicum.models.presets import preset
from modicum.parallel.plan import RECIPES
from modicum.research.planning.published import RUNS
from modicum.research.planning.tables import layer_table

MIXED = RECIPES["mixed"]


@pytest.mark.parametrize("name", ["gpt2", "modern-tiny", "cpm-ant-10b", "chatglm-6b"])
def test_parameters_are_the_models(name):
    config = preset(name)
    padded = replace(config, vocab_multiple=128, scan=True)
    assert layer_table(config, 128, MIXED).parameters == parameter_count(Transformer(padded))


def test_activations_are_those_of_the_paper():
    """34 s b h bytes a layer with dropout and without scores; 5 a s more an element of h where they are
    stored.
    """
    width, heads, length = 1600, 25, 1024
    config = preset("gpt2-xl")
    config = replace(config, layers=1, dropout=0.1)
    kept = {one.name: one for one in layer_table(config, length, MIXED).layers[0].remats}
    assert kept["none"].whole + kept["none"].split == pytest.approx(34 * width + 4 * heads)
    assert kept["full"].whole + kept["full"].split == 2 * width
    assert kept["none"].whole > kept["dots"].whole > kept["full"].whole
    stored = layer_table(config, length, MIXED, flash=False).layers[0].remats[0]
    assert stored.split + stored.whole == pytest.approx(34 * width + 5 * heads * length)


def test_narrow_heads_take_whole_tiles_of_tpus():
    """Attention's kernel keeps queries, keys, values and outputs, of heads of 64 numbers in tiles of 128."""
    config = replace(preset("gpt2"), layers=1)
    plain, tiled = (
        layer_table(config, 1024, RECIPES["modicum"], lanes=lanes).layers[0].remats for lanes in (1, 128)
    )
    assert tiled[0].split - plain[0].split == 4 * 2 * config.width
    assert tiled[1:] == plain[1:]


def test_operations_are_those_that_count():
    """Three forward passes are what MFU counts, vectors of norms and biases aside."""
    config = preset("gpt2-xl")
    table = layer_table(config, 1024, MIXED)
    forward = sum(one.flops for one in (*table.layers, *table.ends))
    assert 3 * forward == pytest.approx(training_flops_per_token(replace(config, scan=True), 1024), rel=0.002)


def test_layers_that_lack_a_sublayer_cost_less():
    config = TransformerConfig(layers=2, width=96, pattern=(Layer(), Layer(without=("attention",))))
    whole, mlp_only = layer_table(config, 64, MIXED).layers
    assert mlp_only.parameters < whole.parameters and mlp_only.keys == 0 and mlp_only.reductions == 1


@pytest.mark.parametrize("run", {run.name: run for run in RUNS}.values(), ids=lambda run: run.name)
def test_published_shapes_have_the_published_counts(run):
    if run.name.startswith("MaxText") and run.name != "MaxText Llama 3.1 8B":
        pytest.skip("shapes of a run above, or of its family")
    count = layer_table(run.config, run.length, MIXED).parameters
    assert count == pytest.approx(run.parameters, rel=0.003)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(InputError, match="transformer-base is an encoder-decoder"):
        layer_table(preset("transformer-base"), 64, MIXED, name="transformer-base")
