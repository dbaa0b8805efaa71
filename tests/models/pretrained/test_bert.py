"""BERT beside `transformers`' on the same files: every head, padding on both sides, old and odd files."""

import json

import numpy as np
import pytest

from modicum import InputError
from modicum.models import ClassifierHead
from modicum.models.pretrained import load_pretrained, save_pretrained

from .oracle import change_settings, compare, ours, perturbed, theirs, tokens, torch, transformers

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

SMALL = {
    # Large enough for scores and activations to leave the range where they are linear.
    "initializer_range": 0.3,
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}


def build(architecture, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SMALL, **options})
    model = perturbed(getattr(transformers, architecture)(config))
    if not config.tie_word_embeddings:  # a parameter of theirs that nothing depends on
        model.cls.predictions.bias.data.copy_(model.cls.predictions.decoder.bias.data)
    return model


def padded(vocab=61, side="right", **more):
    """Two rows of 12 tokens, 4 of the second are padding; two kinds of tokens."""
    mask = np.ones((2, 12), np.int64)
    mask[1, slice(8, 12) if side == "right" else slice(0, 4)] = 0
    types = (np.arange(12) > 5).astype(np.int64) * np.ones((2, 1), np.int64)
    return {"input_ids": tokens(vocab), "attention_mask": mask, "token_type_ids": types, **more}


CASES = {
    "model": ("BertModel", {}),
    "tied": ("BertForMaskedLM", {}),
    "untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "relu": ("BertForMaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 3}),
    "gelu_new": ("BertForMaskedLM", {"hidden_act": "gelu_new", "num_attention_heads": 1}),
    "labels": ("BertForSequenceClassification", {"num_labels": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    architecture, options = CASES[name]
    compare(tmp_path, build(architecture, **options), padded())


def test_the_bias_that_counts(tmp_path):
    """Untied, the original has two, and adds the decoder's."""
    model = build("BertForMaskedLM", tie_word_embeddings=False)
    model.cls.predictions.bias.data.fill_(9.0)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    expected = model.cls.predictions.decoder.bias.detach().numpy()
    assert (np.asarray(loaded.params["head"]["bias"]) == expected).all()


def test_padding_on_the_left(tmp_path):
    compare(tmp_path, build("BertForMaskedLM"), padded(side="left"))


def test_scanned_layers_and_a_padded_vocabulary(tmp_path):
    model = build("BertForMaskedLM")
    model.save_pretrained(tmp_path / "theirs")
    plain = load_pretrained(tmp_path / "theirs")
    scanned = load_pretrained(tmp_path / "theirs", scan=True, vocab_multiple=16)
    assert scanned.params["embedding"]["table"].shape == (64, 24)
    inputs = padded()
    given = {"segments": inputs["attention_mask"], "token_types": inputs["token_type_ids"]}
    one, other = (m.model.apply(m.params, inputs["input_ids"], **given) for m in (plain, scanned))
    np.testing.assert_allclose(other[..., :61], one, atol=1e-5 * np.abs(one).max())
    save_pretrained(tmp_path / "back", scanned.model, scanned.params, settings=scanned.settings)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert (theirs(again, inputs)[0] == theirs(model, inputs)[0]).all()


def test_files_of_the_original_release(tmp_path):
    """`gamma` and `beta`, the next-sentence head and the pooler beside the masked-word head, position ids."""
    from safetensors.torch import load_file, save_file

    model = build("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    extra = {
        "bert.embeddings.position_ids": torch.arange(20)[None],
        "bert.pooler.dense.weight": torch.zeros(24, 24),
        "cls.seq_relationship.weight": torch.zeros(2, 24),
    }
    save_file({**old, **extra}, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert set(loaded.left_out) == {"bert.pooler.dense.weight", "cls.seq_relationship.weight"}
    inputs = padded()
    found = loaded.model.apply(
        loaded.params,
        inputs["input_ids"],
        segments=inputs["attention_mask"],
        token_types=inputs["token_type_ids"],
    )
    expected = theirs(model, inputs)[0]
    gap = np.abs(found - expected)[inputs["attention_mask"] > 0].max()
    assert gap <= 1e-4 * np.abs(expected).max()


def test_one_label(tmp_path):
    """Regression; PyTorch's product with one column rounds by where it lies in memory, so not to the bit."""
    model = build("BertForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs")
    found, expected = ours(loaded, padded())[0], theirs(model, padded())[0]
    assert found.shape == expected.shape == (2, 1)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    save_pretrained(tmp_path / "back", loaded.model, loaded.params, settings=loaded.settings)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert again.num_labels == 1
    assert np.abs(theirs(again, padded())[0] - expected).max() <= 1e-6 * np.abs(expected).max()


def test_another_head_keeps_the_pooler(tmp_path):
    import jax

    build("BertModel").save_pretrained(tmp_path)
    head = ClassifierHead(3, "first", "tanh")
    loaded = load_pretrained(tmp_path, head=head, rng=jax.random.key(0))
    assert set(loaded.initialised) == {"classifier/kernel", "classifier/bias"}
    mean = load_pretrained(tmp_path, head=ClassifierHead(3, "mean"), rng=jax.random.key(0))
    assert set(mean.initialised) == {"classifier/kernel", "classifier/bias"}
    assert set(mean.left_out) == {"pooler.dense.weight", "pooler.dense.bias"}
    hidden = load_pretrained(tmp_path, head=None)
    assert set(hidden.left_out) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert hidden.model.apply(hidden.params, tokens(61)).shape == (2, 12, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, ["is_decoder=True"]),
        ({"is_decoder": True, "add_cross_attention": True}, ["is_decoder", "add_cross_attention=True"]),
        ({"position_embedding_type": "relative_key"}, ["position_embedding_type='relative_key'"]),
        ({"hidden_act": "mish", "embedding_size": 8}, ["hidden_act='mish'", "embedding_size=8"]),
        ({"architectures": ["BertForQuestionAnswering"]}, ["BertForQuestionAnswering", "BertForMaskedLM"]),
    ],
)
def test_what_cannot_be_had_is_refused(changes, words, tmp_path):
    build("BertForMaskedLM").save_pretrained(tmp_path)
    change_settings(tmp_path, changes)
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_lacks_the_pooler(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match=r"pooler\.dense\.weight"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, head=None).left_out == ()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
