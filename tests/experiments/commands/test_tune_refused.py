"""What `modicum tune` on published models refuses, in one line, before anything is trained or written."""

import json
import shutil

import pytest


@pytest.fixture
def tune(refused, tiny_published, data, tmp_path):
    """`modicum tune` on a family's model; returns why it was refused."""

    def run(family, *options, method=("probe",), on=None):
        out = tmp_path / "out"
        said = refused(
            "tune",
            tiny_published(family),
            "--data",
            on or data,
            "--out",
            out,
            "--steps",
            4,
            *options,
            *method,
        )
        assert not out.exists() or not list(out.iterdir())
        return said

    return run


PAIRS = ("--text-column", "one", "--pair-column", "two", "--label-column", "same")
ANSWER = ("--target-column", "label_text")


def test_columns_that_are_not_there(tune, data, pairs):
    columns = "the columns are: text, label, label_text"
    assert tune("bert", "--pair-column", "other") == f"{data}/train.jsonl: no column 'other'; {columns}"
    assert tune("gpt2", "--target-column", "other", method=["lora"]) == (
        f"{data}/train.jsonl: no column 'other'; {columns}"
    )
    assert tune("gpt2", "--prompt", "{text} {mood}", *ANSWER, method=["lora"]) == (
        f"{data}/train.jsonl: no column 'mood'; {columns}"
    )
    assert tune("bert", on=pairs) == (
        f"{pairs}/train.jsonl: no column 'text'; the columns are: one, two, same"
    )
    assert tune(
        "bert", "--text-column", "one", "--pair-column", "same", "--label-column", "same", on=pairs
    ) == (f"{pairs}/train.jsonl: column 'same' holds int64, not text")


def test_options_that_contradict_each_other(tune):
    assert tune("bert", "--prompt", "{text}", "--pair-column", "text") == (
        "--prompt names the columns it is made of: leave out --pair-column text"
    )
    assert tune("gpt2", "--pair-column", "label_text", *ANSWER, method=["lora"]) == (
        "--target-column has the model answer one text: join both by --prompt, such as "
        "'{text} {label_text}', and leave out --pair-column"
    )
    assert tune("bert", "--prompt", "the text") == (
        "template 'the text' names no column; write one in braces, such as {text}"
    )
    assert tune("bert", "--learning-rate", "1e-3", "0.001") == "learning_rate: 0.001 0.001 has a number twice"
    assert tune("bert", "--seeds", 0) == "seeds=0 must be at least 1"
    assert tune("bert", "--length", -1) == (
        "length=-1 must be at least 1, or 0 for as many as the model has positions"
    )


def test_an_encoder_has_no_last_token_and_no_answers(tune, tiny_published):
    folder = tiny_published("bert")
    assert tune("bert", "--pooling", "last") == (
        f"pooling=last of {folder}, an encoder: its last token is no more than a mark; valid: mean, first"
    )
    assert tune("bert", *ANSWER, method=["lora"]) == (
        f"{folder} holds a BertModel; generating needs a language model"
    )


def test_texts_longer_than_the_positions(tune, pairs, rows_file, data, tmp_path):
    for split in ("train", "dev"):
        rows = [
            {"text": "the film " * (20 - 9 * number), "label": number, "label_text": "so"}
            for number in (0, 1)
        ]
        rows_file(tmp_path / "long" / f"{split}.jsonl", rows)
    long = tmp_path / "long"
    assert tune("bert", on=long) == (
        f"{long}/train.jsonl: row 1 has 42 tokens, the longest allowed 32; "
        "allow more, up to the model's positions, or truncate (--truncate)"
    )
    assert tune("gpt2", *ANSWER, method=["lora"], on=long) == (
        f"{long}/train.jsonl: row 1's prompt and target have 42 tokens, the longest allowed 32; "
        "allow more, up to the model's positions, or truncate (--truncate)"
    )
    assert tune("bert", "--length", 64) == (
        "sequence length 64 exceeds the model's 32 positions; use length <= 32 or a model with more positions"
    )
    said = tune("gpt2", "--length", 30, "--truncate", method=["soft-prompt", "--length", 8], on=long)
    assert "exceeds the model's 32 positions" in said


def test_methods_that_do_not_fit(tune, tiny_published):
    assert tune("gpt2", *ANSWER) == (
        "probe trains a classifier's head, which text-to-text has not; choose a delta"
    )
    assert tune("bert", method=["last-layers", "--count", 5]).startswith(
        "last_layers: count=5 is not between 1 and the 2 layers of "
    )
    assert "OFT block_size=32 does not divide its 16 inputs" in tune("bert", method=["oft"])
    assert "LoRA rank=20 exceeds its 16x16 matrix" in tune("bert", method=["lora", "--rank", 20])
    assert tune("bert", method=["adalora", "--target", 0]) == "rank_allocation target=0 must be at least 1"
    assert tune("bert", method=["diff-pruning", "--keep", 2]) == (
        "diff pruning keep=2.0 must be above 0 and at most 1"
    )
    assert tune("bert", method=["lora", "--b-rate", 0]) == "lora_plus ratio=0.0 must be above 0 and finite"
    assert tune("bert", method=["dora", "--alpha", "nan"]) == "DoRA alpha=nan must be finite"
    assert tune("bert", "--ema", 0.9, method=["adalora"]).startswith("--ema does not go with adalora")


def test_what_peft_cannot_have(tune, refused, trained, data, tmp_path):
    peft = ("--peft", tmp_path / "peft")
    assert tune("gpt2", *peft).startswith("--peft writes text-to-text deltas")
    assert tune("gpt2", *peft, *ANSWER, method=["adapter"]) == "--peft: PEFT has no adapter"
    assert "give --shift-positions" in tune("gpt2", *peft, *ANSWER, method=["prefix"])
    oft = tune("gpt2", *peft, *ANSWER, method=["oft", "--block-size", 4])
    assert oft.endswith("attn.c_attn: PEFT has no OFT for weights [in, out] such as Conv1D's")
    assert not (tmp_path / "peft").exists()
    said = refused("tune", trained, "--data", data, "--out", tmp_path / "out", *peft, *ANSWER, "lora")
    assert said == f"--peft is for published models, and {trained} is none"


def test_a_tokenizer_without_an_end(refused, tiny_published, data, tmp_path):
    folder = shutil.copytree(tiny_published("gpt2"), tmp_path / "gpt2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "unk_token": "<unk>"}))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "eos_token_id": None}))
    said = refused("tune", folder, "--data", data, "--out", tmp_path / "out", *ANSWER, "lora")
    assert said == "the tokenizer names no end token, by which the model would know where to stop"


def test_deltas_on_what_they_are_not_for(refused, modicum, tiny_published, data, tmp_path):
    model = tiny_published("gpt2")
    said = modicum("tune", model, "--data", data, "--out", tmp_path, "--steps", 2, "--batch", 4, "probe")
    assert said.code == 0, said.error
    folder = next(tmp_path.glob("probe-*"))
    expected = f"{folder / 'delta'} classifies: `modicum evaluate` measures it; generating needs text-to-text"
    assert refused("generate", model, "--delta", folder, "--prompt", "so") == expected
    assert refused("generate", model, "--delta", folder, "--prompt", "so", "--dtype", "bfloat16") == (
        "--delta belongs to parameters in float32: leave out --dtype bfloat16"
    )
    evaluate = ("evaluate", model, "--data", data, "--delta", folder)
    assert refused(*evaluate, *ANSWER) == (
        "--target-column label_text: the model was tuned to tell labels apart"
    )
    said = refused("evaluate", tiny_published("llama"), "--data", data, "--delta", folder)
    assert said.startswith(f"{folder / 'delta'}: this delta belongs to backbone ")
