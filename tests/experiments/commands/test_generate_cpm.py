"""`modicum generate` on a CPM-Ant, which needs a prompt of its own, and a CPM-Bee, which answers JSON."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models import (
    ExtendedHead,
    GatedMLP,
    LanguageModelHead,
    PreNorm,
    RMSNorm,
    SegmentRelations,
    Transformer,
    TransformerConfig,
    TreeRelations,
    multi_head,
)
from modicum.models.generation import generate
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained.cpm import AntTokenizer, BeeTokenizer, answer

WORDS = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "input"]
WORDS += [*"abcdefgh"]


def save(folder, head, architecture, **choices):
    """A small random model with a vocabulary of 19 words beside it."""
    config = TransformerConfig(
        layers=1,
        width=16,
        vocab=len(WORDS),
        attention=multi_head(2, head_width=8, bias=False),
        mlp=GatedMLP(24, "gelu"),
        norm=RMSNorm(),
        embedding_scale=0.25,
        logit_scale=0.25,
        scaled_linears=True,
        initial_std=2.0,
        **choices,
    )
    model = Transformer(config, head)
    params = model.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    save_pretrained(folder, model, params, architecture=architecture)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def ant(tmp_path_factory):
    positions = SegmentRelations(4, 16, 24, 0.25, prompt_length=3)
    folder = tmp_path_factory.mktemp("ant") / "ant"
    return save(folder, LanguageModelHead(), "CPMAnt", positions=positions, input_rows=12)


@pytest.fixture(scope="module")
def bee(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bee") / "bee"
    choices = {"positions": TreeRelations(16, 64, 20), "residual": PreNorm(divisor=1.05)}
    return save(folder, ExtendedHead(), "CPMBee", **choices)


def test_cpm_ant_reads_its_own_prompt_before_the_text(modicum, ant, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=lambda text, cut_all: list(text)))
    loaded = load_pretrained(ant)
    rows = [[6, 11, 12], [6, 13, 14, 15, 11]]
    given = loaded.prepare(rows)
    assert given.tokens[0].tolist() == [0, 0, 25, 26, 27, 6, 11, 12]  # 19 words, then prompts of 3 tokens
    made = generate(
        loaded.model,
        loaded.params,
        given.tokens,
        segments=given.segments,
        inputs=given.inputs,
        max_new_tokens=6,
    )
    tokenizer = AntTokenizer(ant / "vocab.txt")
    texts = [tokenizer.decode(row) for row in made.tokens]
    single = modicum("generate", ant, "--prompt", "ab", "--max-new-tokens", 6)
    assert single.code == 0, single.error
    assert single.out.rstrip("\n").startswith("ab") and len(np.unique(made.tokens)) > 1
    (tmp_path / "prompts").write_text("ab\ncdea\n")
    both = modicum("generate", ant, "--prompts", tmp_path / "prompts", "--max-new-tokens", 6)
    assert both.code == 0, both.error
    cut = [text if 7 not in row else None for text, row in zip(texts, made.tokens.tolist())]
    lines = both.out.splitlines()
    assert len(lines) == 2 and lines[0] == single.out.rstrip("\n") and texts[0] != texts[1]
    for line, prompt, text in zip(lines, ("ab", "cdea"), cut):
        assert text is None or line == prompt + text


def test_cpm_ant_needs_jieba(refused, ant, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert "pip install jieba" in refused("generate", ant, "--prompt", "ab")


def test_cpm_bee_answers_tasks(modicum, bee, tmp_path):
    tasks = [{"input": "ab", "<ans>": ""}, {"input": "<mask_0>c", "<ans>": {"<mask_0>": ""}}]
    loaded, tokenizer = load_pretrained(bee), BeeTokenizer(bee / "vocab.txt")
    wanted = [each.data for each in answer(loaded.model, loaded.params, tokenizer, tasks, max_new_tokens=5)]
    (tmp_path / "tasks").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    said = modicum("generate", bee, "--prompts", tmp_path / "tasks", "--max-new-tokens", 5)
    assert said.code == 0, said.error
    assert [json.loads(line) for line in said.out.splitlines()] == wanted
    beams = answer(loaded.model, loaded.params, tokenizer, tasks[:1], max_new_tokens=5, beams=3)
    said = modicum("generate", bee, "--prompt", json.dumps(tasks[0]), "--max-new-tokens", 5, "--beams", 3)
    assert json.loads(said.out) == beams[0].data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "ab"), "is not JSON"),
        (("--prompt", '{"input": "ab"}'), 'has no string under "<ans>"'),
        (("--prompt", '{"<ans>": ""}', "--temperature", 1), "leave out --temperature"),
        (("--prompt", '{"<ans>": ""}', "--repetition-penalty", 2), "--repetition-penalty"),
    ],
)
def test_what_is_no_task_is_refused(refused, bee, options, message):
    assert message in refused("generate", bee, *options)


def test_evaluate_refuses_what_reads_a_text_behind_a_prompt(refused, ant, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=lambda text, cut_all: list(text)))
    (tmp_path / "text.txt").write_text("abc\n" * 9)
    said = refused("evaluate", ant, "--data", tmp_path / "text.txt")
    assert "holds a CPMAnt, which reads a text behind a prompt" in said
