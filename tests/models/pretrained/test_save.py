"""Saving, without peers: shards, atomicity, what is handed through, and what cannot be written."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    ClassifierHead,
    GatedMLP,
    GroupedQuery,
    Layer,
    RMSNorm,
    Rotary,
    Transformer,
    TransformerConfig,
)
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained import save as saving
from modicum.models.pretrained.alike import described
from modicum.models.pretrained.files import TensorFiles
from modicum.models.rotary import Llama3Scaling
from modicum.parallel import Layout, MeshShape, make_mesh

TOKENS = np.zeros((1, 2), np.int32)


def tensors(folder):
    files = TensorFiles.open(folder)
    return {name: files.read(name).tobytes() for name in files.names}


def refused(*args, **options):
    with pytest.raises(InputError) as error:
        save_pretrained(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("limit", [1, 2000, 6000])
def test_shards_hold_the_same_tensors(tiny_gpt2, tmp_path, limit):
    folder, model, params = tiny_gpt2
    out = save_pretrained(
        tmp_path / "out", model, params, architecture="GPT2LMHeadModel", max_shard_bytes=limit
    )
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(map(len, part.values())) for part in shards(out).values()]
    assert len(sizes) == len(files)
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, shards(out).values()))
    assert tensors(out) == tensors(folder)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert load_pretrained(out).left_out == ()


def shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict = {}
    for name, value in tensors(folder).items():
        found.setdefault(index["weight_map"][name], {})[name] = value
    return found


@pytest.mark.parametrize(
    "options", [{"scan": True}, {"vocab_multiple": 16}, {"scan": True, "vocab_multiple": 4}]
)
def test_stacked_and_padded_models_are_written_plain(tiny_gpt2, tmp_path, options):
    loaded = load_pretrained(tiny_gpt2[0], **options)
    out = save_pretrained(tmp_path / "out", loaded.model, loaded.params, settings=loaded.settings)
    assert tensors(out) == tensors(tiny_gpt2[0])
    assert json.loads((out / "config.json").read_text()) == loaded.settings


def test_sharded_parameters_are_written_whole(tiny_gpt2, tmp_path):
    mesh = MeshShape.parse("data=2,fsdp=2,tensor=2")
    layout = Layout(make_mesh(mesh), zero=3, minimum=1)
    for scan in (False, True):
        loaded = load_pretrained(tiny_gpt2[0], layout=layout, vocab_multiple=4, scan=scan)
        out = save_pretrained(tmp_path / str(scan), loaded.model, loaded.params, settings=loaded.settings)
        assert tensors(out) == tensors(tiny_gpt2[0])


def test_nothing_is_overwritten_unless_told(tiny_gpt2, tmp_path):
    _, model, params = tiny_gpt2
    out = tmp_path / "out"
    out.mkdir()
    given = (out, model, params)
    save_pretrained(*given, architecture="GPT2LMHeadModel")
    (out / "tokenizer.json").write_text("{}")
    before = tensors(out)
    message = refused(*given, architecture="GPT2LMHeadModel")
    assert "exists and is not empty; choose another folder or give overwrite=True" in message
    changed = jax.tree.map(lambda x: x + 1, params)
    save_pretrained(out, model, changed, architecture="GPT2LMHeadModel", overwrite=True, max_shard_bytes=3000)
    assert tensors(out).keys() == before.keys() and tensors(out) != before
    assert not (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way(tiny_gpt2, tmp_path):
    (tmp_path / "out").write_text("")
    assert "exists and is not empty" in refused(
        tmp_path / "out", *tiny_gpt2[1:], architecture="GPT2LMHeadModel"
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tiny_gpt2, tmp_path, monkeypatch, overwrite):
    folder, model, params = tiny_gpt2
    out = tmp_path / "out"
    if overwrite:
        save_pretrained(out, model, params, architecture="GPT2LMHeadModel")

    def broken(path, tensors):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(saving, "write_file", broken)
    with pytest.raises(OSError, match="the disk is full"):
        save_pretrained(out, model, params, architecture="GPT2LMHeadModel", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert tensors(out) == tensors(folder)


def test_parameters_that_are_not_the_models(tiny_gpt2, tmp_path):
    _, model, params = tiny_gpt2
    wrong = {key: value for key, value in params.items() if key != "final_norm"}
    wrong |= {"adapter": {"~lora": np.zeros((2, 2), np.float32)}}
    wrong["embedding"] = {"table": np.zeros((7, 16), np.float32)}
    wrong["position_embedding"] = {"table": np.zeros((20, 16), np.complex64)}
    message = refused(tmp_path / "out", model, wrong, architecture="GPT2LMHeadModel")
    assert "final_norm/scale is missing, final_norm/bias is missing" in message.replace(
        "final_norm/bias is missing, final_norm/scale is missing",
        "final_norm/scale is missing, final_norm/bias is missing",
    )
    assert "adapter/~lora is not the model's" in message
    assert "embedding/table [7, 16] (valid: [50, 16])" in message
    assert "position_embedding/table has type complex64" in message


def test_architectures_that_cannot_be_written(tiny_gpt2, tmp_path):
    _, model, params = tiny_gpt2
    out = tmp_path / "out"
    assert "give architecture=, the class in transformers" in refused(out, model, params)
    assert "GPT2Model ends in None, the model in Lang" in refused(
        out, model, params, architecture="GPT2Model"
    )
    assert "mlp=MLP cannot be written as this family; it has GatedMLP" in refused(
        out, model, params, architecture="LlamaForCausalLM"
    )
    windowed = replace(model, config=replace(model.config, attention=GroupedQuery(2, window=3)))
    message = refused(out, windowed, params, architecture="GPT2LMHeadModel")
    assert message.startswith("GPT2LMHeadModel cannot express this model: layer_0=(GroupedQuery(") and (
        "window=3" in message and "would be read as" in message
    )


def test_settings_are_handed_through(tiny_gpt2, tmp_path):
    loaded = load_pretrained(tiny_gpt2[0])
    settings = {**loaded.settings, "eos_token_id": 7, "task_specific_params": {"a": 1}, "resid_pdrop": 0.25}
    out = save_pretrained(tmp_path / "out", loaded.model, loaded.params, settings=settings)
    assert json.loads((out / "config.json").read_text()) == settings


def test_settings_that_no_longer_describe_the_model_are_replaced(tiny_gpt2, tmp_path, random_parameters):
    _, model, _ = tiny_gpt2
    settings = {**load_pretrained(tiny_gpt2[0]).settings, "eos_token_id": 7}
    larger = Transformer(replace(model.config, vocab=60, layers=3))
    out = save_pretrained(tmp_path / "out", larger, random_parameters(larger, TOKENS), settings=settings)
    written = json.loads((out / "config.json").read_text())
    assert (written["vocab_size"], written["n_layer"], written["eos_token_id"]) == (60, 3, 7)


def test_a_model_of_ones_own_goes_out_and_comes_back(tmp_path, random_parameters):
    """Built here, scanned, with zeros for what follows from the rest; LLaMA's file says it all."""
    config = TransformerConfig(
        layers=4,
        width=16,
        vocab=30,
        attention=GroupedQuery(4, 2, bias=False),
        mlp=GatedMLP(24),
        norm=RMSNorm(1e-5),
        positions=Rotary(500.0, scaling=Llama3Scaling(8.0, original_length=16)),
        tied=False,
        vocab_multiple=8,
        scan=True,
    )
    model = Transformer(config)
    params = random_parameters(model, TOKENS)
    out = save_pretrained(tmp_path / "out", model, params, architecture="LlamaForCausalLM")
    loaded = load_pretrained(out, scan=True, vocab_multiple=8)
    assert described(loaded.model.config) == described(config)
    stacked = loaded.params["layers"]["attention"]["query"]["kernel"]
    assert np.array_equal(stacked, params["layers"]["attention"]["query"]["kernel"])
    assert TensorFiles.open(out).shape("lm_head.weight") == (30, 16)


def test_another_familys_settings_keep_only_what_all_have(tiny_gpt2, tmp_path, random_parameters):
    settings = {**load_pretrained(tiny_gpt2[0]).settings, "eos_token_id": 7}
    config = TransformerConfig(
        layers=2,
        width=16,
        vocab=30,
        attention=GroupedQuery(2, bias=False),
        mlp=GatedMLP(24),
        norm=RMSNorm(),
        positions=Rotary(),
    )
    model = Transformer(config)
    given = (model, random_parameters(model, TOKENS))
    out = save_pretrained(tmp_path / "out", *given, architecture="LlamaForCausalLM", settings=settings)
    written = json.loads((out / "config.json").read_text())
    assert written["eos_token_id"] == 7 and "n_embd" not in written
    assert load_pretrained(out).architecture == "LlamaForCausalLM"


def test_windows_of_a_pattern_go_out_and_come_back(tmp_path, random_parameters):
    attention = GroupedQuery(2, output_bias=False)
    config = TransformerConfig(
        layers=4,
        width=16,
        vocab=30,
        attention=attention,
        mlp=GatedMLP(24),
        norm=RMSNorm(),
        positions=Rotary(),
        pattern=(Layer(replace(attention, window=3)), Layer()),
    )
    model = Transformer(config)
    out = save_pretrained(
        tmp_path / "out", model, random_parameters(model, TOKENS), architecture="Qwen2ForCausalLM"
    )
    written = json.loads((out / "config.json").read_text())
    assert written["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert written["use_sliding_window"] and written["sliding_window"] == 3
    assert described(load_pretrained(out).model.config) == described(config)


def test_a_head_that_no_architecture_has(tiny_gpt2, tmp_path):
    loaded = load_pretrained(tiny_gpt2[0], head=ClassifierHead(3), rng=jax.random.key(0))
    message = refused(tmp_path / "out", loaded.model, loaded.params, settings=loaded.settings)
    assert "GPT2LMHeadModel ends in LanguageModelHead(), the model in ClassifierHead(labels=3" in message
