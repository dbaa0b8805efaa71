"""`modicum generate` on a published checkpoint and on what `modicum train` left."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from modicum.models import MLP, GatedMLP, Learned, Transformer, TransformerConfig, multi_head
from modicum.models.generation import beam_search, generate
from modicum.models.presets import modern
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained.tokenizers import load_tokenizer
from modicum.research.data.tokenizers import train_tokenizer
from modicum.research.evaluation import strided_perplexity

TEXTS = ["the film was good and warm", "a dull story of the cold", "it was a lovely film"]
NEW = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny GPT-2 with random weights, in a folder as the hub has them."""
    folder = tmp_path_factory.mktemp("published") / "gpt2"
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    config = TransformerConfig(
        layers=1,
        width=16,
        vocab=tokenizer.vocab,
        attention=multi_head(2),
        mlp=MLP(32, "gelu_tanh"),
        positions=Learned(64),
        initial_std=1.0,
    )
    model = Transformer(config)
    params = model.init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))
    save_pretrained(folder, model, params, architecture="GPT2LMHeadModel")
    tokenizer.save(folder / "tokenizer.json")
    return folder


def continuation(folder, text, count=8):
    """What the library's own `generate` makes of a prompt."""
    pretrained, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    made = generate(pretrained.model, pretrained.params, tokenizer.encode(text), max_new_tokens=count)
    return text + tokenizer.decode(made.tokens[0])


def test_a_prompt_is_continued_as_the_library_does(modicum, published):
    said = modicum("generate", published, "--prompt", TEXTS[0], *NEW)
    assert said.code == 0, said.error
    assert said.out == continuation(published, TEXTS[0]) + "\n"


def test_prompts_of_a_file_are_continued_together(modicum, published, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n\n")
    said = modicum("generate", published, "--prompts", file, *NEW)
    assert said.code == 0, said.error
    assert said.out == "".join(continuation(published, text) + "\n" for text in TEXTS)


def test_sampling_is_repeatable_and_depends_on_the_seed(modicum, published):
    options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95)
    said = [
        modicum("generate", published, "--prompt", TEXTS[0], *NEW, *options, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


def test_the_best_of_several_beams_is_printed(modicum, published):
    pretrained, tokenizer = load_pretrained(published), load_tokenizer(published)
    prompt = tokenizer.encode(TEXTS[1])
    for penalty in (1.0, 3.0):
        options = {"max_new_tokens": 3, "repetition_penalty": penalty}
        found = beam_search(pretrained.model, pretrained.params, prompt, beams=4, **options)
        options = ("--beams", 4, "--max-new-tokens", 3, "--repetition-penalty", penalty)
        said = modicum("generate", published, "--prompt", TEXTS[1], *options)
        assert said.code == 0, said.error
        assert said.out == TEXTS[1] + tokenizer.decode(found.tokens[0, 0]) + "\n"


def test_a_stop_text_ends_the_continuation(modicum, published):
    whole = continuation(published, TEXTS[0]).removeprefix(TEXTS[0])
    stop = whole[2:4]
    said = modicum("generate", published, "--prompt", TEXTS[0], *NEW, "--stop", stop)
    assert said.code == 0, said.error
    made = said.out.removesuffix("\n").removeprefix(TEXTS[0])
    assert whole.startswith(made) and stop in made and len(made) < len(whole)


def test_a_trained_run_generates(modicum, trained):
    said = modicum("generate", trained, "--prompt", "the film was", "--max-new-tokens", 4)
    assert said.code == 0, said.error
    assert said.out.startswith("the film was")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "give --prompt TEXT or --prompts FILE"),
        (("--prompt", "a", "--beams", 0), "beams=0 must be at least 1"),
        (("--prompt", "a", "--beams", 2, "--temperature", 1), "leave out --temperature"),
        (("--prompt", "a", "--beams", 2, "--top-k", 5), "leave out --temperature, --top-k"),
        (("--prompt", "a", "--top-p", 0.9), "top_p=0.9 narrows what is sampled from: give --temperature"),
        (("--prompt", "a", "--temperature", -1), "temperature=-1"),
        (("--prompt", "a", "--top-p", 0), "top_p=0"),
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens=0"),
        (("--prompt", "a", "--max-new-tokens", 100), "the model's 64 positions"),
    ],
)
def test_bad_options_are_one_line(refused, published, options, message):
    assert message in refused("generate", published, *options)


def with_settings(folder, other, **files):
    """A checkpoint's folder with further settings in some of its files, by their names without the ending."""
    other.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (other / name).symlink_to(folder / name)
    for name, settings in files.items():
        file = other / f"{name}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(old | settings))
    return other


def test_a_text_ends_where_either_file_of_settings_says(modicum, published, tmp_path):
    pretrained, tokenizer = load_pretrained(published), load_tokenizer(published)
    made = generate(pretrained.model, pretrained.params, tokenizer.encode(TEXTS[0]), max_new_tokens=8)
    second = int(made.tokens[0, 1])
    silent = {
        "eos_token_id": None,
        "decoder_start_token_id": 0,
    }  # a null says nothing, a decoder has no start
    folder = with_settings(
        published, tmp_path / "m", config={"eos_token_id": [second]}, generation_config=silent
    )
    said = modicum("generate", folder, "--prompt", TEXTS[0], *NEW)
    assert said.code == 0, said.error
    first = made.tokens[0].tolist().index(second)
    assert said.out == TEXTS[0] + tokenizer.decode(made.tokens[0, : first + 1]) + "\n"


def test_a_key_that_nobody_knows_is_refused_or_passed_over(modicum, refused, published, tmp_path):
    folder = with_settings(published, tmp_path / "m", config={"is_llama_config": True})
    asked = ("generate", folder, "--prompt", TEXTS[0], *NEW)
    assert "is_llama_config=True (unknown key" in refused(*asked)
    said = modicum(*asked, "--ignore", "is_llama_config")
    assert said.code == 0, said.error


def test_a_damaged_generation_config_is_one_line(refused, published, tmp_path):
    folder = with_settings(published, tmp_path / "m", generation_config={})
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json is damaged" in refused("generate", folder, "--prompt", "a")


def test_a_special_token_may_be_the_stop_text(modicum, published, tmp_path):
    pretrained, tokenizer = load_pretrained(published), load_tokenizer(published)
    made = generate(pretrained.model, pretrained.params, tokenizer.encode(TEXTS[0]), max_new_tokens=8)
    assert tokenizer.decode(made.tokens[0, 1:])  # of which nothing is to be seen
    first = tokenizer.inner.id_to_token(int(made.tokens[0, 0]))
    inner = json.loads((published / "tokenizer.json").read_text())
    marked = {"id": int(made.tokens[0, 0]), "content": first, "special": True}
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    folder = with_settings(
        published, tmp_path / "m", tokenizer={"added_tokens": [*inner["added_tokens"], marked | how]}
    )
    prompt = TEXTS[0]
    said = modicum("generate", folder, "--prompt", prompt, *NEW, "--stop", first)
    assert said.code == 0, said.error
    assert said.out == prompt + "\n"


def test_a_missing_model_is_one_line(refused, tmp_path):
    assert "nowhere is not a folder" in refused("generate", tmp_path / "nowhere", "--prompt", "a")


def test_an_empty_file_of_prompts_is_one_line(refused, published, tmp_path):
    (tmp_path / "empty").write_text("\n")
    assert "no line of text" in refused("generate", published, "--prompts", tmp_path / "empty")


def test_a_file_of_prompts_that_is_no_text_is_one_line(refused, published, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "is not text in UTF-8" in refused("generate", published, "--prompts", tmp_path / "bytes")


def test_a_classifier_does_not_generate(refused, published, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    settings = json.loads((published / "config.json").read_text()) | {"architectures": ["GPT2Model"]}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(published / name)
    assert "needs a language model" in refused("generate", folder, "--prompt", "a")


def test_a_published_model_is_evaluated_by_a_sliding_window(modicum, published, rows_file, tmp_path):
    file = rows_file(tmp_path / "test.jsonl", ({"text": text} for text in TEXTS * 6))
    said = modicum("evaluate", published, "--data", file, "--length", 16, "--stride", 4)
    assert said.code == 0, said.error
    pretrained, tokenizer = load_pretrained(published), load_tokenizer(published)
    ids = tokenizer.encode("\n\n".join(TEXTS * 6))
    found = strided_perplexity(pretrained.model, pretrained.params, ids, window=16, stride=4)
    assert f"perplexity {found.perplexity:.4f}" in said.out


def test_a_window_is_not_made_up_for_positions_without_a_limit(refused, tmp_path):
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    model = Transformer(replace(modern(1, 16, 2, 1, tokenizer.vocab), mlp=GatedMLP(32)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    settings = {"model_type": "llama", "max_position_embeddings": 512}
    folder = tmp_path / "llama"
    save_pretrained(folder, model, params, architecture="LlamaForCausalLM", settings=settings)
    tokenizer.save(folder / "tokenizer.json")
    (tmp_path / "test.txt").write_text("\n".join(TEXTS) + "\n")
    said = refused("evaluate", folder, "--data", tmp_path / "test.txt")
    assert "give --length, a window in tokens; config.json has max_position_embeddings=512" in said


def test_a_trained_run_is_evaluated_by_a_sliding_window_too(modicum, trained, tmp_path):
    (tmp_path / "test.txt").write_text("\n".join(TEXTS * 6) + "\n")
    said = modicum("evaluate", trained, "--data", tmp_path / "test.txt", "--length", 16, "--stride", 4)
    assert said.code == 0, said.error
    assert said.out.startswith("loss ") and "bits_per_byte" in said.out
