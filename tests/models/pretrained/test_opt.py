"""OPT beside `transformers`' on the same files: both orders of norms, and the 350M model's projections."""

import numpy as np
import pytest

from modicum import InputError
from modicum.models.pretrained import load_pretrained

from ..generation.greedy_oracle import assert_greedy_equal
from .oracle import change_settings, compare, perturbed, tokens, torch, transformers

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

SMALL = {
    # Large enough for scores and activations to leave the range where they are linear.
    "init_std": 0.3,
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 40,
    "max_position_embeddings": 20,
}
LARGE_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}


def build(architecture="OPTForCausalLM", **options):
    torch.manual_seed(0)
    config = transformers.OPTConfig(**{**SMALL, **options})
    return perturbed(getattr(transformers, architecture)(config))


def padded(side="right"):
    mask = np.ones((2, 12), np.int64)
    mask[1, slice(8, 12) if side == "right" else slice(0, 4)] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": tokens(61), "attention_mask": mask, "position_ids": positions}


CASES = {
    "before": ("OPTForCausalLM", {}),
    "untied": ("OPTForCausalLM", {"tie_word_embeddings": False}),
    "after_350m": ("OPTForCausalLM", LARGE_350M),
    "after_350m_untied": ("OPTForCausalLM", {**LARGE_350M, "tie_word_embeddings": False}),
    "projected": ("OPTForCausalLM", {"word_embed_proj_dim": 16}),
    "removed": ("OPTForCausalLM", {"_remove_final_layer_norm": True}),
    "no_biases": ("OPTForCausalLM", {"enable_bias": False, "activation_function": "gelu"}),
    "model": ("OPTModel", {}),
    "model_after": ("OPTModel", {"do_layer_norm_before": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    architecture, options = CASES[name]
    compare(tmp_path, build(architecture, **options), padded())


def test_padding_on_the_left(tmp_path):
    compare(tmp_path, build(), padded("left"))


@pytest.mark.parametrize("options", [LARGE_350M, {"_remove_final_layer_norm": True, "enable_bias": False}])
def test_greedy_continuations(options, tmp_path):
    """64 tokens after prompts of several lengths in one batch, token for token."""
    model = build(**options, max_position_embeddings=90)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    prompts = [tokens(61, 1, length, seed=length)[0].tolist() for length in (9, 4, 13, 1)]
    assert assert_greedy_equal(loaded.model, loaded.params, model, prompts, 64, pad=1) == 0


def test_the_first_position_is_row_2(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.params["position_embedding"]["table"].shape == (22, 24)
    with pytest.raises(InputError, match="20 positions"):
        loaded.model.apply(loaded.params, np.zeros((1, 21), np.int32))


def test_hidden_states_before_the_last_projection(tmp_path):
    build(**LARGE_350M).save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, head=None)
    assert loaded.left_out == ("model.decoder.project_out.weight",)
    assert loaded.model.apply(loaded.params, tokens(61)).shape == (2, 12, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine=False"]),
        ({"activation_function": "mish"}, ["activation_function='mish'"]),
        ({"architectures": ["OPTModel"], "word_embed_proj_dim": 16}, ["word_embed_proj_dim=16", "head=None"]),
        ({"architectures": ["OPTForQuestionAnswering"]}, ["OPTForQuestionAnswering", "OPTForCausalLM"]),
    ],
)
def test_what_cannot_be_had_is_refused(changes, words, tmp_path):
    build().save_pretrained(tmp_path)
    change_settings(tmp_path, changes)
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)
