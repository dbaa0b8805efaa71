"""`modicum tune` on published checkpoints: pairs of texts, answers in text, and what is stored of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from modicum.models.generation import generate
from modicum.models.pretrained import load_pretrained
from modicum.models.pretrained.tokenizers import load_tokenizer
from modicum.research.delta.peft import load_peft
from modicum.research.training.tuning import load_tuned

OPTIONS = ["--batch", 8, "--steps", 8, "--evaluate-every", 4, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def tune(modicum, tiny_published, tmp_path_factory):
    """Tune a published model; returns what was said and the folder of the last run."""

    def run(family, method, *options, data, out=None):
        out = out or tmp_path_factory.mktemp(family)
        arguments = [tiny_published(family), "--data", data, "--out", out, *OPTIONS, *options, *method]
        said = modicum("tune", *arguments)
        assert said.code == 0, said.error
        return said, Path(re.search(r"^best: (\S+): ", said.out, re.M)[1])

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def notes_of(folder):
    return json.loads((folder / "delta" / "delta.json").read_text())["notes"]


PAIRS = ("--text-column", "one", "--pair-column", "two", "--label-column", "same")


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("bert", "mean"),
        ("gpt2", "last"),
        pytest.param("llama", "last", marks=pytest.mark.slow),
        pytest.param("roberta", "mean", marks=pytest.mark.slow),
        pytest.param("t5", "mean", marks=pytest.mark.slow),
    ],
)
def test_pairs_are_classified_and_measured_again(tune, modicum, tiny_published, pairs, family, pooling):
    _, folder = tune(family, ["lora", "--rank", 2], *PAIRS, data=pairs)
    result, notes = result_of(folder), notes_of(folder)
    assert notes["pooling"] == pooling and notes["labels"] == [0, 1]
    assert notes["reading"]["pair_column"] == "two"
    again = modicum("evaluate", tiny_published(family), "--data", pairs, "--delta", folder)
    expected = f"loss {result['test_loss']:.4f}  accuracy {result['test_accuracy']:.4f}\n"
    assert (again.code, again.out) == (0, expected), again.error


ANSWERS = ("--prompt", "{text} so", "--target-column", "label_text")


@pytest.fixture(scope="module")
def answering(tune, data):
    """Tune a published model to answer in text, each family and method once."""
    done = {}

    def run(family, *method):
        if (family, method) not in done:
            done[family, method] = tune(family, method, *ANSWERS, data=data)
        return done[family, method]

    return run


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gpt2", ["adapter", "--width", 4]),
        ("t5", ["lora", "--rank", 4]),
        pytest.param("llama", ["prefix", "--length", 3], marks=pytest.mark.slow),
        pytest.param("gpt2", ["soft-prompt", "--length", 3], marks=pytest.mark.slow),
        pytest.param("t5", ["soft-prompt", "--length", 3], marks=pytest.mark.slow),
        pytest.param("t5", ["diff-pruning", "--keep", 0.1], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_answers_in_text(answering, modicum, tiny_published, data, family, method):
    said, folder = answering(family, *method)
    result, notes = result_of(folder), notes_of(folder)
    assert notes["kind"] == "text-to-text" and notes["reading"]["prompt"] == "{text} so"
    means = r"test loss \S+, test accuracy \S+% of tokens, \S+% of texts exact"
    assert re.search(rf"^best: \S+: {means}, [\d,]+ trained parameters, ", said.out, re.M), said.out
    again = modicum("evaluate", tiny_published(family), "--data", data, "--delta", folder)
    measured = {name: result[f"test_{name}"] for name in ("loss", "accuracy", "exact_match")}
    expected = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
    assert (again.code, again.out) == (0, f"{expected}\n"), again.error


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", ["adapter", "--width", 4]), ("t5", ["lora", "--rank", 4])],
    ids=["gpt2", "t5"],
)
def test_generate_writes_what_the_tuned_model_says(answering, modicum, tiny_published, family, method):
    _, folder = answering(family, *method)
    prompt = "the film was good so"
    said = modicum(
        "generate", tiny_published(family), "--delta", folder, "--prompt", prompt, "--max-new-tokens", 4
    )
    assert said.code == 0, said.error
    pretrained, tokenizer = load_pretrained(tiny_published(family)), load_tokenizer(tiny_published(family))
    model, params = load_tuned(folder / "delta", pretrained.model, pretrained.params).plain()
    start = 0 if family == "t5" else None
    made = generate(
        model,
        params,
        tokenizer.encode(prompt),
        max_new_tokens=4,
        stop_tokens=(tokenizer.eos,),
        decoder_tokens=start,
    )
    text = tokenizer.decode(made.rows()[0])
    assert said.out.split() == (text if family == "t5" else f"{prompt} {text}").split()


def test_the_code_on_the_page_runs(answering, tiny_published):
    _, folder = answering("gpt2", "adapter", "--width", 4)
    page = (Path(__file__).parents[3] / "docs" / "tuning.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    for published, here in (
        ("openai-community/gpt2", tiny_published("gpt2")),
        ("runs/tune/lora-0.001", folder),
    ):
        assert published in code
        code = code.replace(published, str(here))
    names = {"tokens": np.arange(6)[None]}
    exec(code, names)
    assert np.isfinite(names["logits"]).all() and len(names["made"].rows()[0]) <= 4


@pytest.mark.parametrize(
    "method",
    [
        ["lora", "--rank", 2],
        pytest.param(
            ["prefix", "--length", 3, "--reparameterise", 4, "--shift-positions"], marks=pytest.mark.slow
        ),
    ],
    ids=["lora", "prefix"],
)
def test_an_adapter_of_peft_is_written_beside(tune, tiny_published, data, tmp_path, method):
    target = tmp_path / "peft"
    said, folder = tune("gpt2", method, *ANSWERS, "--peft", target, data=data)
    assert said.out.endswith(f"{target}: the same as an adapter of PEFT\n")
    pretrained, tokens = load_pretrained(tiny_published("gpt2")), np.arange(6)[None]
    theirs, variables = load_peft(target, pretrained)
    ours = load_tuned(folder / "delta", pretrained.model, pretrained.params)
    expected = ours.tuned.apply(ours.variables, ours.params, tokens)
    np.testing.assert_allclose(theirs.apply(variables, pretrained.params, tokens), expected, atol=1e-5)


def test_an_answer_is_learned(tune, modicum, data):
    more = ["--steps", 120, "--batch", 16, "--evaluate-every", 60, "--learning-rate", 0.01]
    _, folder = tune("gpt2", ["full"], *ANSWERS, *more, data=data)
    result = result_of(folder)
    assert result["test_accuracy"] > 0.75 and result["test_exact_match"] > 0.5
    said = modicum("generate", folder, "--prompt", "the film was lovely so", "--max-new-tokens", 3)
    assert said.out.split()[-1] in ("positive", "</s>")
    again = modicum("evaluate", folder, "--data", data)
    assert again.out.endswith(f"exact_match {result['test_exact_match']:.4f}\n"), again.error
