"""CPM-Bee against its formulas in NumPy, on a random file: no oracle of it is installed."""

import json
from math import erf, log, sqrt

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modicum import InputError
from modicum.models import Transformer, TreePositions
from modicum.models.costs import parameter_count
from modicum.models.pretrained import cpm_bee, load_pretrained, save_pretrained
from modicum.models.pretrained.cpm import BeeTokenizer, Vocabulary, answer, encode, left_padded, pack
from modicum.models.pretrained.cpm.bee import Word
from modicum.models.pretrained.files import TensorFiles
from modicum.models.pretrained.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = ["<pad>", "<unk>", "<mask>", "<sep>", "\n", " ", "<s>", "</s>", "<root>", "<ans>", "<option>"]
WORDS += ["input", "question", "options", *"abcdefghijklmnopq"]
D, H, K, L, F, V = 32, 4, 8, 2, 48, len(WORDS)
BUCKETS, RELATIONS, FARTHEST = 16, 64, 20
LIVE = {
    "model_type": "cpm-live-bee",
    "architectures": ["CPMBee"],
    "vocab_size": V,
    "dim_model": D,
    "dim_ff": F,
    "num_layers": L,
    "num_heads": H,
    "dim_head": K,
    "dropout_p": 0.0,
    "position_bias_num_buckets": BUCKETS,
    "position_bias_num_segment_buckets": RELATIONS,
    "position_bias_max_distance": FARTHEST,
    "eps": 1e-6,
    "half": True,
}
TASKS = [
    {"input": "abc<mask_0>de<mask_1>", "<ans>": {"<mask_0>": "fg", "<mask_1>": "h"}},
    {"question": "xy abx", "options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option_1>xc"},
]
EXAMPLE = {"input": "q<mask_0>", "<ans>": {"<mask_0>": "op"}}


@pytest.fixture(scope="module")
def tokenizer():
    return BeeTokenizer(Vocabulary({word: number for number, word in enumerate(WORDS)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of the repository's kind with random tensors; linear ones have variance 1."""
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape, mean=0.0, std=1.0):
        tensors[name] = (mean + std * rng.normal(size=shape)).astype(np.float32)

    add("input_embedding.weight", V, D, std=2.0)
    add("position_bias.relative_attention_bias", BUCKETS + RELATIONS, H)
    for i in range(L):
        block = f"encoder.layers.{i}"
        add(f"{block}.self_att.layernorm_before_attention.weight", D, mean=1.0, std=0.2)
        for name in ("project_q", "project_k", "project_v"):
            add(f"{block}.self_att.self_attention.{name}.weight", H * K, D)
        add(f"{block}.self_att.self_attention.attention_out.weight", D, H * K)
        add(f"{block}.ffn.layernorm_before_ffn.weight", D, mean=1.0, std=0.2)
        add(f"{block}.ffn.ffn.w_in.w_0.weight", F, D)
        add(f"{block}.ffn.ffn.w_in.w_1.weight", F, D)
        add(f"{block}.ffn.ffn.w_out.weight", D, F)
    add("encoder.output_layernorm.weight", D, mean=1.0, std=0.2)
    path = tmp_path_factory.mktemp("bee")
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(LIVE))
    return path


@pytest.fixture(scope="module")
def pretrained(folder):
    with jax.enable_x64(True):
        return load_pretrained(folder, dtype="float64")


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def linear(x, weight):
    return x @ weight.T / sqrt(x.shape[-1])


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(erf)(x / sqrt(2)))


def embed(table, ids, sub):
    """Rows over sqrt(d), all of each rotated by position 16 sub, pairs in the two halves."""
    e = table[ids] / sqrt(D)
    angle = 16 * np.asarray(sub)[:, None] * 10_000.0 ** (-np.arange(0, D, 2) / D)
    angle = np.concatenate([angle, angle], -1)
    return e * np.cos(angle) + np.concatenate([-e[:, D // 2 :], e[:, : D // 2]], -1) * np.sin(angle)


def row_of_bias(relation, distance):
    if relation:
        return BUCKETS + relation - 1
    half, exact = BUCKETS // 2, BUCKETS // 4
    side, distance = half * (distance > 0), abs(distance)
    if distance < exact:
        return side + distance
    return side + min(exact + int(log(distance / exact) / log(FARTHEST / exact) * (half - exact)), half - 1)


def forward(folder, sample, index=None, extra=()):
    """Logits of one sample, vocabulary and `extra` words, pair by pair by the research page, §5.2."""
    tensors = {name: x.astype(float) for name, x in load_file(folder / "model.safetensors").items()}
    table, bias_table = tensors["input_embedding.weight"], tensors["position_bias.relative_attention_bias"]
    n = len(sample.ids)
    index = np.arange(n) if index is None else index
    allowed, bias = np.zeros((n, n), bool), np.zeros((H, n, n))
    for q, k in np.ndindex(n, n):
        same = sample.tree[q] == sample.tree[k]
        relation = 1
        if same:
            relation = sample.relations[sample.tree[q]][sample.segment[q], sample.segment[k]]
        bias[:, q, k] = bias_table[row_of_bias(relation, int(index[k] - index[q]))]
        seen = sample.context[k] or (not sample.context[q] and k <= q)
        allowed[q, k] = seen and (sample.tree[q] == 0 or same)
    h = embed(table, sample.ids, sample.sub)
    for i in range(L):
        prefix = f"encoder.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        a = rms(h, own["self_att.layernorm_before_attention.weight"])
        q, k, v = (
            linear(a, own[f"self_att.self_attention.project_{name}.weight"]).reshape(n, H, K)
            for name in "qkv"
        )
        scores = np.einsum("qhd,khd->hqk", q, k) / sqrt(K) + bias
        weights = np.where(allowed, np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        context = np.einsum("hqk,khd->qhd", weights, v).reshape(n, H * K)
        h = (h + linear(context, own["self_att.self_attention.attention_out.weight"])) / 1.05
        b = rms(h, own["ffn.layernorm_before_ffn.weight"])
        inner = gelu(linear(b, own["ffn.ffn.w_in.w_0.weight"])) * linear(b, own["ffn.ffn.w_in.w_1.weight"])
        h = (h + linear(inner, own["ffn.ffn.w_out.weight"])) / 1.05
    h = rms(h, tensors["encoder.output_layernorm.weight"])
    words = h / sqrt(D) @ table.T
    if not len(extra):
        return words
    return np.concatenate([words, h @ embed(table, *map(np.array, zip(*extra))).T], -1)


def assert_near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_those_of_the_formulas(x64, folder, pretrained, tokenizer, packed):
    samples = [encode(TASKS[0], tokenizer, examples=[EXAMPLE]), encode(TASKS[1], tokenizer)]
    batch = pack(samples, tokenizer, 100) if packed else left_padded(samples, tokenizer)
    logits = np.asarray(pretrained.model.apply(pretrained.params, batch.tokens, **batch.arguments))
    extra = list(zip(batch.extra.words.tolist(), batch.extra.sub.tolist()))
    assert logits.shape[-1] == V + 3 and sorted(extra) == [(1, 1), (2, 1), (10, 1)]
    for number, sample in enumerate(samples):
        n, start = len(sample), len(samples[0]) if number else 0
        row, place = (0, slice(start, start + n)) if packed else (number, slice(-n, None))
        assert_near(logits[row, place], forward(folder, sample, extra=extra))


def test_scanned_and_padded_models_compute_the_same(folder, tokenizer):
    """Extra words stand behind the vocabulary, not behind its padding."""
    batch = left_padded([encode(task, tokenizer) for task in TASKS], tokenizer)
    one, two = load_pretrained(folder), load_pretrained(folder, scan=True, vocab_multiple=16)
    first, second = (
        np.asarray(each.model.apply(each.params, batch.tokens, **batch.arguments)) for each in (one, two)
    )
    assert two.params["embedding"]["table"].shape == (32, D) and first.shape == second.shape
    np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())


def test_a_task_sees_its_example_and_the_example_not_the_task(x64, pretrained, tokenizer):
    def hidden(task, example):
        batch = left_padded([encode(task, tokenizer, examples=[example])], tokenizer)
        model = Transformer(pretrained.model.config, None)
        given = {name: value for name, value in batch.arguments.items() if name != "extra"}
        return batch, np.asarray(model.apply(pretrained.params, batch.tokens, **given))[0]

    other = {**TASKS[0], "input": "cba<mask_0>ed<mask_1>"}
    batch, first = hidden(TASKS[0], EXAMPLE)
    _, second = hidden(other, EXAMPLE)
    _, third = hidden(TASKS[0], {**EXAMPLE, "input": "o<mask_0>"})
    main = batch.main[0]
    np.testing.assert_array_equal(first[~main], second[~main])
    assert (abs(first[main] - second[main]).max(-1) > 1e-6).all()
    assert (abs(first[main] - third[main]).max(-1) > 1e-6).all()


def test_a_word_of_number_0_is_the_token_itself(x64, pretrained, tokenizer):
    one, two = (
        left_padded([encode({"input": text, "<ans>": "a"}, tokenizer)], tokenizer)
        for text in ("b<mask_4>", "b<mask>")
    )
    logits = [pretrained.model.apply(pretrained.params, each.tokens, **each.arguments) for each in (one, two)]
    np.testing.assert_array_equal(*logits)


def greedy(folder, task, tokenizer, examples, limit):
    """Answers by the formulas: the whole text anew for each word, answers behind what is given."""
    sample = encode(task, tokenizer, examples=examples, open_answers=True)
    extra = [word for word in dict.fromkeys(sample.names.words.values()) if word.sub]
    known = any(word.id == 1 for word in sample.names.words.values())
    texts, written = [], 0
    index = list(range(len(sample)))
    columns = {name: list(getattr(sample, name)) for name in ("ids", "sub", "context", "segment", "tree")}
    for node in sample.open:
        words, word = [], (6, 0)
        while written < limit:
            for name, value in zip(columns, (*word, False, node.number, 0)):
                columns[name].append(value)
            index.append(len(words))
            now = type(sample)(
                **{name: np.array(x) for name, x in columns.items()},
                relations=sample.relations,
                names=sample.names,
            )
            logits = forward(folder, now, np.array(index), extra)[-1]
            logits[1] -= 0 if known else 10_000
            best, second = np.sort(logits)[-1:-3:-1]
            assert best - second > 1e-4, "the test's weights leave a choice open"
            token, written = int(logits.argmax()), written + 1
            word = (token, 0) if token < V else extra[token - V]
            if word == (7, 0):
                break
            words.append(word)
        texts.append(words)
    return texts, written < limit or word == (7, 0)


def test_answers_are_written_one_after_another(x64, folder, pretrained, tokenizer):
    """In a batch, from a cache, and as the formulas choose them; then back into the JSON."""
    blank = [{**TASKS[0], "<ans>": {"<mask_0>": "", "<mask_1>": ""}}, {**TASKS[1], "<ans>": ""}]
    examples, limit = [[EXAMPLE], []], 7
    found = answer(
        pretrained.model, pretrained.params, tokenizer, blank, examples=examples, max_new_tokens=limit
    )
    for task, more, (data, finished) in zip(blank, examples, found):
        wanted, ended = greedy(folder, task, tokenizer, more, limit)
        names = encode(task, tokenizer, examples=more).names
        texts = [tokenizer.text([Word(*word) for word in words], names) for words in wanted]
        given = data["<ans>"].values() if isinstance(data["<ans>"], dict) else [data["<ans>"]]
        assert list(given) == texts and finished == ended
        assert {key: value for key, value in data.items() if key != "<ans>"} == {
            key: value for key, value in task.items() if key != "<ans>"
        }


def scores_of(pretrained, tokenizer, task, answers):
    """Log-probabilities of each word after the text of `task` with one of `answers`, `[answers, 2, V]`."""
    samples = [encode({**task, "<ans>": text}, tokenizer) for text in answers]
    batch = left_padded(samples, tokenizer)
    logits = pretrained.model.apply(pretrained.params, batch.tokens, **batch.arguments)
    logits = np.array(logits)[:, -2:, :V]
    logits[..., 1] -= 10_000
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_all_beams_find_the_likeliest_answer(x64, pretrained, tokenizer, penalty):
    """With as many beams as words, a search of two steps has seen all answers; each pair is tried here."""
    tasks = [{"input": "abc", "<ans>": ""}, {"question": "q", "<ans>": ""}]
    found = answer(
        pretrained.model,
        pretrained.params,
        tokenizer,
        tasks,
        max_new_tokens=2,
        beams=V + 1,
        length_penalty=penalty,
    )
    words = [word for word in WORDS if word not in ("</s>", "<unk>")]
    for task, (data, _) in zip(tasks, found):
        scores = scores_of(pretrained, tokenizer, task, words)
        best = {"": scores[0, 0, 7]}
        for number, word in enumerate(words):
            first, following = scores[number, 0, WORDS.index(word)], scores[number, 1]
            for second in (*words, "</s>"):
                text = word + ("" if second == "</s>" else second)
                value = (first + following[WORDS.index(second)]) / 2**penalty
                best[text] = max(best.get(text, -np.inf), value)
        values = sorted(best.values())
        assert values[-1] - values[-2] > 1e-6
        assert data["<ans>"] == max(best, key=best.get)


def test_several_beams_keep_answers_apart(x64, pretrained, tokenizer):
    """Three beams in a batch give each task what they give it alone, places of several answers too."""
    blank = [{**TASKS[0], "<ans>": {"<mask_0>": "", "<mask_1>": ""}}, {**TASKS[1], "<ans>": ""}]
    options = {"max_new_tokens": 8, "beams": 3}
    model, params = pretrained.model, pretrained.params
    both = answer(model, params, tokenizer, blank, **options)
    alone = [answer(model, params, tokenizer, [task], **options)[0] for task in blank]
    assert both == alone and set(both[0].data["<ans>"]) == {"<mask_0>", "<mask_1>"}


def test_both_kinds_of_files_hold_the_same(folder, tmp_path):
    """The hub's names and keys, with the tied copy; out and in again of both, bit by bit."""
    tensors = load_file(folder / "model.safetensors")
    named = {f"cpmbee.{name}": x for name, x in tensors.items()}
    named["lm_head.weight"] = tensors["input_embedding.weight"]
    named["cpmbee.input_embedding.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    renamed = {
        "dim_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }
    settings = {renamed.get(key, key): value for key, value in LIVE.items()}
    settings |= {"model_type": "cpmbee", "architectures": ["CpmBeeForCausalLM"], "init_std": 1.0}
    (tmp_path / "hub").mkdir()
    save_file(named, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings))
    live, hub = load_pretrained(folder), load_pretrained(tmp_path / "hub")
    assert live.model == hub.model
    for source, loaded in ((folder, live), (tmp_path / "hub", hub)):
        back = tmp_path / f"back-{loaded.architecture}"
        save_pretrained(back, loaded.model, loaded.params, settings=loaded.settings)
        again = load_pretrained(back)
        assert again.model == loaded.model and again.settings["dim_ff"] == F
        bare = save_pretrained(
            tmp_path / f"bare-{loaded.architecture}",
            loaded.model,
            loaded.params,
            architecture=loaded.architecture,
        )
        assert load_pretrained(bare).model == loaded.model
        for one, two in zip(jax.tree.leaves(live.params), jax.tree.leaves(again.params), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
        before, after = TensorFiles.open(source), TensorFiles.open(back)
        assert len(after.names) == 3 + 9 * L == len(tensors)
        assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in after.names)


def test_compressed_models_lack_sublayers(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if "layers.0.ffn" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**LIVE, "mask_modules": [[False, True], [False, False]]})
    )
    loaded = load_pretrained(tmp_path)
    assert "mlp" not in loaded.params["layers_0"] and "mlp" in loaded.params["layers_1"]


def test_the_published_model_has_its_parameters():
    settings = Settings({"dim_model": 4096, "num_layers": 48, "num_heads": 32})
    config = cpm_bee.read(cpm_bee.LIVE, settings)
    head = cpm_bee.FAMILIES[0].head("CpmBeeForCausalLM", settings)
    assert parameter_count(Transformer(config, head)) == 9_616_080_896
    assert config == cpm_bee.read(cpm_bee.HUB, Settings({}))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "tasks is empty"),
        ([{"input": "a"}], {}, r'tasks\[0\] has no string under "<ans>"'),
        ([{"<ans>": ""}], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([{"<ans>": ""}], {"beams": 0}, "beams=0; at least 1 is valid"),
        ([{"<ans>": ""}], {"examples": [[], []]}, "examples are for 2 tasks; there are 1"),
    ],
)
def test_what_cannot_be_answered(pretrained, tokenizer, tasks, options, message):
    with pytest.raises(InputError, match=message):
        answer(pretrained.model, pretrained.params, tokenizer, tasks, **options)


def test_positions_are_a_pytree_of_a_row(tokenizer):
    batch = left_padded([encode(TASKS[0], tokenizer)], tokenizer)
    assert isinstance(batch.positions, TreePositions)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(batch.positions)} == {batch.tokens.shape}


def test_rows_of_ids_are_no_prompts(pretrained):
    with pytest.raises(InputError, match="CPM-Bee reads tasks in JSON, not rows of ids"):
        pretrained.prepare([[6, 14]])
