"""RoBERTa and XLM-R beside `transformers`' on the same files."""

import numpy as np
import pytest

from modicum import InputError
from modicum.models.pretrained import load_pretrained

from .oracle import change_settings, compare, perturbed, torch, transformers

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

SMALL = {
    # Large enough for scores and activations to leave the range where they are linear.
    "initializer_range": 0.3,
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 18,
    "type_vocab_size": 1,
}


def build(architecture, **options):
    torch.manual_seed(0)
    kind = transformers.XLMRobertaConfig if architecture.startswith("XLM") else transformers.RobertaConfig
    model = perturbed(getattr(transformers, architecture)(kind(**{**SMALL, **options})))
    if not model.config.tie_word_embeddings:  # a parameter of theirs that nothing depends on
        model.lm_head.bias.data.copy_(model.lm_head.decoder.bias.data)
    return model


def padded(padding=1):
    """Two rows of 12 tokens, of which the second ends in 4 of padding: the oracle looks for their number."""
    numbers = np.random.default_rng(0).integers(padding + 1, 61, (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, 8:] = 0
    return {"input_ids": np.where(mask > 0, numbers, padding), "attention_mask": mask}


CASES = {
    "model": ("RobertaModel", {}),
    "tied": ("RobertaForMaskedLM", {}),
    "untied": ("RobertaForMaskedLM", {"tie_word_embeddings": False, "type_vocab_size": 2}),
    "padding": ("RobertaForMaskedLM", {"pad_token_id": 5, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "labels": ("RobertaForSequenceClassification", {"num_labels": 3}),
    "xlm_model": ("XLMRobertaModel", {}),
    "xlm_tied": ("XLMRobertaForMaskedLM", {}),
    "xlm_labels": ("XLMRobertaForSequenceClassification", {"num_labels": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    architecture, options = CASES[name]
    compare(tmp_path, build(architecture, **options), padded(options.get("pad_token_id", 1)))


def test_the_longest_input(tmp_path):
    """16 of the table's 18 rows are positions."""
    build("RobertaForMaskedLM").save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    loaded.model.apply(loaded.params, np.full((1, 16), 7))
    with pytest.raises(InputError, match="16 positions"):
        loaded.model.apply(loaded.params, np.full((1, 17), 7))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, ["is_decoder=True"]),
        ({"position_embedding_type": "relative_key_query"}, ["relative_key_query"]),
        ({"architectures": ["RobertaForCausalLM"]}, ["RobertaForCausalLM", "RobertaForMaskedLM"]),
    ],
)
def test_what_cannot_be_had_is_refused(changes, words, tmp_path):
    build("RobertaForMaskedLM").save_pretrained(tmp_path)
    change_settings(tmp_path, changes)
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_pooler_beside_the_masked_word_head(tmp_path):
    """Files of the hub have it; no output of the architecture needs it. Anything else unknown is refused."""
    from safetensors.torch import load_file, save_file

    build("RobertaForMaskedLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    pooler = {
        "roberta.pooler.dense.weight": torch.zeros(24, 24),
        "roberta.pooler.dense.bias": torch.zeros(24),
    }
    save_file({**tensors, **pooler}, tmp_path / "model.safetensors")
    assert set(load_pretrained(tmp_path).left_out) == set(pooler)
    save_file({**tensors, "roberta.poolers.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"unknown tensors: roberta\.poolers\.weight"):
        load_pretrained(tmp_path)
