"""T5 1.0 and 1.1 beside `transformers`' on the same files: outputs, hidden states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.models import GatedMLP
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained.assemble import their_tensors
from modicum.models.pretrained.mapping import place
from modicum.models.pretrained.t5 import entries

from ..generation.greedy_oracle import assert_greedy_equal
from .oracle import change_settings, compare, perturbed, theirs, tokens, torch, transformers

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

SMALL = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
OLD = {**SMALL, "feed_forward_proj": "relu"}
NEW = {**SMALL, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def build(architecture="T5ForConditionalGeneration", own_logits=False, **options):
    """`own_logits`: a matrix for the logits that is not the embedding's, as in version 1.1's files."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.T5Config(**options))
    if own_logits:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(61, 24) * 0.3)
    return perturbed(model)


def both(length=14, decoder=12):
    """Two pairs of rows; the second's input ends in 5, its output in 3 tokens of padding."""
    mask, decoder_mask = np.ones((2, length), np.int64), np.ones((2, decoder), np.int64)
    mask[1, -5:], decoder_mask[1, -3:] = 0, 0
    return {
        "input_ids": tokens(61, length=length),
        "attention_mask": mask,
        "decoder_input_ids": tokens(61, length=decoder, seed=1),
        "decoder_attention_mask": decoder_mask,
    }


CASES = {
    "v1.0": ({}, OLD),
    "v1.1": ({"own_logits": True}, NEW),
    "v1.1_tied": ({}, NEW),
    "deeper_decoder": ({}, {**OLD, "num_decoder_layers": 3, "d_kv": 5, "feed_forward_proj": "gelu"}),
    "shallow_decoder": (
        {"own_logits": True},
        {**NEW, "num_decoder_layers": 1, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2},
    ),
    "model": ({"architecture": "T5Model"}, OLD),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    how, options = CASES[name]
    compare(tmp_path, build(**how, **options), both())


@pytest.mark.parametrize("options", [OLD, NEW])
def test_encoder_alone(options, tmp_path):
    inputs = {key: value for key, value in both().items() if "decoder" not in key}
    compare(tmp_path, build("T5EncoderModel", **options), inputs)


def test_distances_beyond_the_last_bucket(tmp_path):
    """A whole range of buckets: the bias decides the scores where the rest of the model is small."""
    inputs = both(length=40, decoder=30)
    model = build(**{**OLD, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 20})
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.normal_(std=2.0)
    compare(tmp_path, model, inputs)


def test_original_files_of_version_1_1(tmp_path):
    """`tie_word_embeddings` false and no derived keys, as the files on the hub have it: the same model."""
    build(own_logits=True, **NEW).save_pretrained(tmp_path)
    newer = load_pretrained(tmp_path)
    derived = ("scale_decoder_outputs", "dense_act_fn", "is_gated_act")
    change_settings(tmp_path, {**dict.fromkeys(derived), "tie_word_embeddings": False})
    older = load_pretrained(tmp_path)
    config = older.model.config
    assert not config.tied and config.logit_scale == 1.0 and config.mlp == GatedMLP(40, "gelu_tanh")
    assert older.model == newer.model
    assert jax.tree.all(jax.tree.map(np.array_equal, older.params, newer.params))


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_gradients(name, tmp_path):
    """Of the mean cross-entropy of the labels that are no padding, with respect to every tensor."""
    how, options = CASES[name]
    model, inputs = build(**how, **options), both()
    labels = np.where(inputs["decoder_attention_mask"] > 0, tokens(61, length=12, seed=2), -100)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    given = {key: torch.as_tensor(value) for key, value in inputs.items()}
    expected_loss = model(**given, labels=torch.as_tensor(labels)).loss
    expected_loss.backward()

    def loss(params):
        logits = loaded.model.apply(
            params,
            inputs["input_ids"],
            segments=inputs["attention_mask"],
            decoder_tokens=inputs["decoder_input_ids"],
            decoder_segments=inputs["decoder_attention_mask"],
        )
        scores = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -(picked * (labels >= 0)).sum() / (labels >= 0).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(loaded.params)
    assert abs(float(value) - expected_loss.item()) <= 1e-5 * expected_loss.item()
    config = loaded.model.config
    leaves = place(entries(config, loaded.model.head), config)
    found = {tensor.name: tensor.make() for tensor in their_tensors(leaves, gradients)}
    expected = {name: each.grad.numpy() for name, each in model.named_parameters()}
    assert set(found) == set(expected) and len(flatten_dict(gradients)) == len(found)
    scale = max(np.abs(each).max() for each in expected.values())
    for name, each in expected.items():
        assert np.abs(found[name] - each).max() <= 1e-4 * scale, name
        assert np.abs(each).max() > 0, name


def test_greedy_continuations_of_a_shallow_decoder(tmp_path):
    """64 tokens, token for token; the oracle cannot generate with a decoder deeper than the encoder."""
    model = build(own_logits=True, **NEW, num_decoder_layers=1, decoder_start_token_id=0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    prompts = [tokens(61, 1, length, seed=length)[0].tolist() for length in (9, 4, 13, 1)]
    assert assert_greedy_equal(loaded.model, loaded.params, model, prompts, 64, pad=0, start=0) == 0


def test_exported_for_a_model_made_here(tmp_path):
    """A model that no file of theirs gave: written, and computed by `transformers` alike."""
    from modicum.models import MLP, GroupedQuery, RelativeBuckets, RMSNorm, Transformer, TransformerConfig

    config = TransformerConfig(
        kind="encoder-decoder",
        layers=1,
        decoder_layers=2,
        width=16,
        vocab=61,
        attention=GroupedQuery(2, head_width=12, bias=False, scale=1.0),
        mlp=MLP(32, "relu", bias=False),
        norm=RMSNorm(),
        positions=RelativeBuckets(),
        tied=False,
        logit_scale=0.25,
    )
    model, inputs = Transformer(config), both()
    given = {
        "segments": inputs["attention_mask"],
        "decoder_tokens": inputs["decoder_input_ids"],
        "decoder_segments": inputs["decoder_attention_mask"],
    }
    params = jax.jit(model.init)(jax.random.key(0), inputs["input_ids"], **given)
    save_pretrained(tmp_path / "out", model, params, architecture="T5ForConditionalGeneration")
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    expected = theirs(other, inputs)[0]
    found = np.asarray(jax.jit(model.apply)(params, inputs["input_ids"], **given))
    gap = np.abs(found - expected)[inputs["decoder_attention_mask"] > 0].max()
    assert gap <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_proj": "gated-mish", "dense_act_fn": "mish"}, ["gated-mish", "gelu_new"]),
        ({"is_decoder": True}, ["is_decoder=True"]),
        ({"architectures": ["T5ForQuestionAnswering"]}, ["T5ForQuestionAnswering", "T5EncoderModel"]),
    ],
)
def test_what_cannot_be_had_is_refused(changes, words, tmp_path):
    build(**OLD).save_pretrained(tmp_path)
    change_settings(tmp_path, changes)
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_tied_settings_with_other_logits_are_refused(tmp_path):
    """Version 1.0's settings, but the file has another matrix for the logits."""
    build(own_logits=True, **OLD).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load_pretrained(tmp_path)
