"""`modicum sparsity` on a tiny decoder: its tables, the converted model, and what that generates."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.experiments.commands.sparsity import share_of
from modicum.models import MLP, FATReLU, Learned, TopK, Transformer, TransformerConfig, multi_head
from modicum.research.data.tokenizers import Tokenizer, train_tokenizer
from modicum.research.sparsity import load_statistics
from modicum.research.training.model_folder import load_model, save_model

TEXTS = ["the film was good and warm", "a dull story of the cold", "it was a lovely film"]
SMALL = ("--length", 8, "--rows", 12)
EXPERTS = ("--neurons", 8, "--tokens", 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A decoder with random weights, its tokenizer, and texts in a file beside it."""
    folder = tmp_path_factory.mktemp("sparsity")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    config = TransformerConfig(
        layers=2,
        width=16,
        vocab=tokenizer.vocab,
        attention=multi_head(2),
        mlp=MLP(32, "relu"),
        positions=Learned(32),
        initial_std=0.5,
    )
    body = Transformer(config)
    save_model(
        folder / "model", body, body.init(jax.random.key(0), jnp.zeros((1, 2), int)), tokenizer=tokenizer
    )
    return folder


def test_neurons_are_measured_and_nothing_is_written_unasked(modicum, model):
    before = sorted(model.rglob("*"))
    said = modicum("sparsity", model / "model", "--data", model / "texts.jsonl", *SMALL)
    assert said.code == 0, said.error
    assert (
        "layers_1/mlp/act" in said.out
        and "mass in top 10%" in said.out
        and "of the neurons are active" in said.out
    )
    assert sorted(model.rglob("*")) == before


def test_a_mesh_measures_the_same(modicum, model):
    given = ("sparsity", model / "model", "--data", model / "texts.jsonl", *SMALL)
    there = modicum(*given, "--mesh", "data=8")
    assert there.code == 0, there.error
    counts = [
        [line for line in said.out.splitlines() if "mlp/act" in line] for said in (modicum(*given), there)
    ]
    assert len(counts[0]) == 4 and counts[0] == counts[1]


def test_a_converted_model_is_measured_and_generates(modicum, model, tmp_path):
    out = tmp_path / "out"
    said = modicum(
        *("sparsity", model / "model", "--data", model / "texts.jsonl", *SMALL, *EXPERTS),
        *("--moefy", "50%", "--router", "centres", "--out", out),
    )
    assert said.code == 0, said.error
    assert "2 of 4 experts of 8 neurons: 50.0% of the feed-forward products" in said.out
    assert {each.name for each in (out / "tables").glob("*.csv")} == {
        "activation.csv",
        "mass.csv",
        "moefied.csv",
    }
    assert "Captured mass" in (out / "report.html").read_text()
    assert len(load_statistics(out / "activations.safetensors").layers) == 2
    made = load_model(out / "model")
    assert (made.model.config.mlp.chosen, made.model.config.mlp.experts) == (2, 4)
    dense = load_model(model / "model")
    own = np.sort(np.asarray(dense.params["layers_0"]["mlp"]["up"]["kernel"]).T.ravel())
    np.testing.assert_array_equal(np.sort(made.params["layers_0"]["mlp"]["experts"]["up"].ravel()), own)
    said = modicum("generate", out / "model", "--prompt", TEXTS[0], "--max-new-tokens", 3)
    assert said.code == 0 and said.out.startswith(TEXTS[0]), said.error
    again = modicum("sparsity", out / "model", "--data", model / "texts.jsonl", *SMALL)
    assert again.code == 2 and "mlp/act" in again.error


def test_all_experts_generate_what_the_dense_model_does(modicum, model, tmp_path):
    said = modicum(
        *("sparsity", model / "model", "--data", model / "texts.jsonl", *SMALL, "--partition", "random"),
        *(*EXPERTS, "--moefy", "100%", "--router", "similarity", "--out", tmp_path / "out"),
    )
    assert said.code == 0, said.error
    new = ("--prompt", TEXTS[1], "--max-new-tokens", 4)
    assert modicum("generate", tmp_path / "out" / "model", *new) == modicum("generate", model / "model", *new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--moefy", "20%"), "--moefy writes a model: give --out FOLDER"),
        (("--moefy", "twenty", "--out", "x"), "'twenty' is no share"),
        (("--moefy", "50%", "--neurons", 5, "--out", "x"), "32 neurons do not divide into experts of 5"),
        (("--rows", 0), "rows=0 must be at least 1"),
        (("--data",), "--data names no data; give at least one"),
        (("--relufy", 2), "--relufy writes a model: give --out FOLDER"),
        (("--relufy", 2, "--out", "x"), "--relufy trains on rows that are not measured"),
        (
            ("--relufy", 2, "--relufy-to", "drelu", "--moefy", "20%", "--out", "x"),
            "--moefy cannot cut layers of --relufy-to drelu",
        ),
        (
            ("--price", 0.1, "--teacher", "text", "--learning-rate", 0.1),
            "--teacher and --price and --learning-rate given, but nothing is trained without --relufy STEPS",
        ),
        (("--relufy", -1, "--out", "x"), "--relufy -1 must be at least 0 steps"),
        (
            ("--relufy", 2, "--relufy-to", "gelu", "--out", "x"),
            "activation 'gelu' is unknown; valid: relu, relu2, drelu, fatrelu:0.1, topk:32, statistical-topk",
        ),
        (("--relufy", 2, "--price", -1, "--out", "x"), "prices [0.0, -1.0] must be finite and at least 0"),
        (
            ("--moefy", "50%", "--mesh", "data=2", "--out", "x"),
            "--moefy computes on one device; leave out --mesh",
        ),
        (("--mesh", "data=3"), "mesh data=3 needs 3 devices, 8 are here"),
        (("--neurons", 8, "--rank", 4), "--neurons and --rank given, but nothing is cut into experts"),
        (
            ("--moefy", "50%", "--rank", 4, "--out", "x"),
            "--rank given, but --router mlp has no rank; low-rank has",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(modicum, model, arguments, message):
    given = ("sparsity", model / "model", "--data", model / "texts.jsonl", "--length", 8, *arguments)
    said = modicum(*given)
    assert said.code == 2 and message in said.error and said.error.count("\n") == 1


def test_a_source_given_twice_is_refused_however_it_is_written(modicum, model):
    texts = model / "texts.jsonl"
    other = model / "model" / ".." / "texts.jsonl"
    said = modicum("sparsity", model / "model", "--data", texts, other, *SMALL)
    assert said.code == 2 and f"--data names {texts} twice ({other}); give each source once" in said.error


def test_sources_of_one_file_name_are_told_apart(modicum, model, tmp_path):
    (tmp_path / "texts.jsonl").write_text((model / "texts.jsonl").read_text())
    files = [str(folder / "texts.jsonl") for folder in (model, tmp_path)]
    said = modicum("sparsity", model / "model", "--data", *files, *SMALL)
    assert said.code == 0, said.error
    assert all(f"| {file} " in said.out for file in files)


def test_shares_are_percentages_or_fractions():
    assert share_of("20%") == pytest.approx(0.2) and share_of("0.2") == 0.2


def test_a_relufied_model_is_measured_by_data_set_and_generates(modicum, model, tmp_path):
    """Of a GELU model: another function, some steps, pairs and two data sets in one call."""
    dense = load_model(model / "model")
    gelu = Transformer(replace(dense.model.config, mlp=MLP(32, "gelu")))
    tokenizer = Tokenizer.load(dense.tokenizer)
    save_model(tmp_path / "gelu", gelu, dense.params, tokenizer=tokenizer)
    (tmp_path / "more.jsonl").write_text((model / "texts.jsonl").read_text())
    out = tmp_path / "out"
    said = modicum(
        *("sparsity", tmp_path / "gelu", "--data", model / "texts.jsonl", tmp_path / "more.jsonl"),
        *("--length", 8, "--rows", 5, "--relufy", 2, "--batch", 4, "--price", 0.1, "--pairs", "--out", out),
    )
    assert said.code == 0, said.error
    assert "changed, untrained" in said.out and "nonzero before" in said.out
    assert "as it was" in said.out and "more.jsonl" in said.out and "strongest pair" in said.out
    made = load_model(out / "model")
    assert made.model.config.mlp.activation == "relu" and made.notes["relufied"] == str(tmp_path / "gelu")
    assert load_statistics(out / "activations.safetensors").layers[0].together.shape == (32, 32)
    new = ("--prompt", TEXTS[0], "--max-new-tokens", 2)
    assert modicum("generate", out / "model", *new).code == 0
    assert "Which fire together" in (out / "report.html").read_text()


def test_an_encoder_is_relufied_towards_its_hidden_states(modicum, model, tmp_path):
    dense = load_model(model / "model")
    body = Transformer(replace(dense.model.config, layers=1, kind="encoder", mlp=MLP(32, "gelu")), None)
    params = body.init(jax.random.key(1), jnp.zeros((1, 2), int))
    save_model(tmp_path / "body", body, params, tokenizer=Tokenizer.load(dense.tokenizer))
    out = tmp_path / "out"
    given = ("sparsity", tmp_path / "body", "--data", model / "texts.jsonl", "--length", 8, "--rows", 5)
    said = modicum(*given, "--relufy", 2, "--batch", 4, "--relufy-to", "topk:6", "--out", out)
    assert said.code == 0, said.error
    assert "same neighbour" in said.out and "distance" in said.out
    made = load_model(out / "model")
    assert made.model.config.mlp.activation == TopK(6) and made.model.config.kind == "encoder"
    assert load_statistics(out / "activations.safetensors").nonzero_ratio <= 6 / 32
    said = modicum(*given, "--relufy", 2, "--teacher", "text", "--out", out)
    assert said.code == 2 and "an encoder has no next token that text could teach" in said.error


def test_what_was_trained_is_kept_where_its_neurons_cannot_be_measured(modicum, model, tmp_path):
    given = ("sparsity", model / "model", "--data", model / "texts.jsonl", "--length", 8, "--rows", 5)
    said = modicum(*given, "--relufy", 1, "--relufy-to", "fatrelu:1e6", "--out", tmp_path)
    assert said.code == 2 and f"the changed model is in {tmp_path / 'model'}" in said.out
    assert "layers_0/mlp/act, layers_1/mlp/act: no token of any batch has an activation that is" in said.error
    assert load_model(tmp_path / "model").model.config.mlp.activation == FATReLU(1e6)
