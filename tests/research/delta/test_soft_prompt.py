"""A soft prompt is n new words in front: held to models whose vocabulary has them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    ClassifierHead,
    GroupedQuery,
    RelativeBuckets,
    Rotary,
    Transformer,
    TransformerConfig,
)
from modicum.models.cache import Cache
from modicum.models.generation import generate
from modicum.models.kernels import Causal
from modicum.models.positions import Learned
from modicum.models.precision import FP64
from modicum.research.delta import (
    SAID,
    LoRA,
    Prefix,
    PromptEncoder,
    SoftPrompt,
    as_transformer,
    attach,
    folded,
    load_delta,
    only,
    save_delta,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

N, V = 3, 50
TOKENS = np.random.default_rng(5).integers(0, V, (2, 6))
RIGHT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LEFT = RIGHT[:, ::-1]


def tuned_model(method, head=None, call=None, **options):
    """Tuned model in double precision, its variables, and parameters drawn at random."""
    config = {"layers": 1, "width": 16, "vocab": V, "precision": FP64, "attention": GroupedQuery(4, 2)}
    more = {} if head is None else {"head": head}
    model = Transformer(config=TransformerConfig(**{**config, **options}), **more)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, **(call or {}))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), shapes)
    tuned = attach(model, method)
    return tuned, tuned.init(jax.random.key(1), params, TOKENS, **(call or {})), params


def with_words(tuned, variables, params):
    """The model and parameters with the prompt's vectors as its last words."""
    config = tuned.model.config
    bigger = dataclasses.replace(tuned.model, config=dataclasses.replace(config, vocab=V + N))
    prompt = variables["delta"]["~soft_prompt"]["prompt"] / (config.embedding_scale or np.sqrt(config.width))
    table = jnp.concatenate([params["embedding"]["table"][:V], prompt])
    return bigger, {**params, "embedding": {"table": table}}


def in_front(x, first):
    """`x [B, T]` with n columns before it."""
    return np.concatenate([np.broadcast_to(first, (len(x), N)), x], 1)


WORDS = in_front(TOKENS, np.arange(V, V + N))
CASES = {
    "plain": ({}, {}, {}),
    "padding on the right": ({}, {"segments": RIGHT}, {"segments": in_front(RIGHT, 1)}),
    "padding on the left": (
        {"positions": Rotary()},
        {"segments": 2 * LEFT},
        {"segments": in_front(2 * LEFT, 2)},
    ),
    "positions, token types": (
        {"positions": Learned(16), "token_types": 2},
        {"positions": TOKENS % 5, "token_types": TOKENS % 2},
        {"positions": in_front(TOKENS % 5 + N, np.arange(N)), "token_types": in_front(TOKENS % 2, 0)},
    ),
    "encoder": (
        {"kind": "encoder", "embedding_norm": True, "positions": Learned(9)},
        {"segments": RIGHT},
        {"segments": in_front(RIGHT, 1)},
    ),
    "scaled embedding, scan": ({"embedding_scale": 3.0, "scan": True}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_new_words(case, x64):
    options, given, wanted = CASES[case]
    tuned, variables, params = tuned_model(SoftPrompt(N, initialisation="uniform"), **options)
    model, more = with_words(tuned, variables, params)
    got = jax.jit(tuned.apply)(variables, params, TOKENS, **given)
    want = jax.jit(model.apply)(more, WORDS, **wanted)[:, N:, :V]
    assert got.shape == (2, 6, V)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert jnp.abs(got - jax.jit(tuned.model.apply)(params, TOKENS, **given)).max() > 1e-3


def test_a_classifier_keeps_its_shape(x64):
    tuned, variables, params = tuned_model(SoftPrompt(N, initialisation="uniform"), ClassifierHead(N + 6))
    model, more = with_words(tuned, variables, params)
    got = jax.jit(tuned.apply)(variables, params, TOKENS, segments=RIGHT)
    assert got.shape == (2, N + 6)
    want = jax.jit(model.apply)(more, WORDS, segments=in_front(RIGHT, 1))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_the_last_column_alone(x64):
    tuned, variables, params = tuned_model(SoftPrompt(N))
    whole = jax.jit(tuned.apply)(variables, params, TOKENS)
    last = jax.jit(functools.partial(tuned.apply, last=True))(variables, params, TOKENS)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-12)


def test_in_an_encoder_decoder_the_encoder_reads_it(x64):
    call = {"decoder_tokens": TOKENS[:, :4], "segments": RIGHT}
    options = {"kind": "encoder-decoder", "positions": RelativeBuckets(8, 16)}
    tuned, variables, params = tuned_model(SoftPrompt(N, initialisation="uniform"), call=call, **options)
    model, more = with_words(tuned, variables, params)
    got = jax.jit(tuned.apply)(variables, params, TOKENS, **call)
    want = jax.jit(model.apply)(more, WORDS, **{**call, "segments": in_front(RIGHT, 1)})
    assert got.shape == (2, 4, V)
    np.testing.assert_allclose(got, want[..., :V], rtol=0, atol=1e-12)
    cache = Cache.empty(2, 4)
    first = {**call, "decoder_tokens": TOKENS[:, :2], "cache": cache}
    run = jax.jit(tuned.apply)
    out, cache = run(variables, params, TOKENS, **first)
    rest, _ = run(variables, params, None, decoder_tokens=TOKENS[:, 2:4], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([out, rest], 1), got, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_decoding_with_a_cache_is_the_full_pass(given, x64):
    tuned, variables, params = tuned_model(SoftPrompt(N), positions=Rotary(), scan=True)
    at = np.maximum(np.cumsum(LEFT, 1) - 1, 0)
    run = jax.jit(tuned.apply)
    full = run(variables, params, TOKENS, segments=LEFT, positions=at)
    pieces, cache = [], Cache.empty(2, 6)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        more = {"segments": LEFT[:, :4]} if start == 0 else {}
        more |= {"positions": at[:, start:end]} if given else {}
        out, cache = run(variables, params, TOKENS[:, start:end], cache=cache, **more)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1)[LEFT > 0], full[LEFT > 0], rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="9 tokens do not fit a cache of capacity 8"):
        tuned.apply(variables, params, TOKENS, cache=Cache.empty(2, 5))


def test_it_starts_as_words_of_the_vocabulary(x64):
    for options in ({}, {"embedding_scale": 2.0}, {"embedding_scale": 0.0}):
        tuned, variables, params = tuned_model(SoftPrompt(5, tokens=(7, 9)), **options)
        words = tuned.model.config.embedding_scale or 4.0
        wanted = params["embedding"]["table"][np.array([7, 9, 7, 9, 7])] * words
        np.testing.assert_allclose(variables["delta"]["~soft_prompt"]["prompt"], wanted, rtol=1e-12)
    first = tuned_model(SoftPrompt(5))[1]["delta"]["~soft_prompt"]["prompt"]
    np.testing.assert_allclose(first, params["embedding"]["table"][:5], rtol=1e-12)
    uniform = tuned_model(SoftPrompt(40, initialisation="uniform"))[1]["delta"]["~soft_prompt"]["prompt"]
    assert 0.45 < jnp.abs(uniform).max() <= 0.5


class Foreign(nn.Module):
    """A model that knows nothing of prompts: an embedding of another name and a mean over tokens."""

    @nn.compact
    def __call__(self, tokens, attention_mask=None, weights=None):
        x = nn.Embed(V, 8, name="words")(tokens)
        mask = jnp.ones_like(tokens) if attention_mask is None else attention_mask
        x = nn.Dense(8)(x) + (x * mask[..., None]).sum(1, keepdims=True)
        return x if weights is None else x * weights[..., None]


def test_another_model_names_its_embedding(x64):
    model = Foreign()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    tuned = attach(model, {"": SoftPrompt(N, "words"), "Dense_0": LoRA(2)})
    variables = tuned.init(jax.random.key(1), params, TOKENS)
    prompt = variables["delta"]["~soft_prompt"]["prompt"]
    np.testing.assert_array_equal(prompt, params["words"]["embedding"][:N])
    prompt = prompt + 1.0
    variables = {**variables, "delta": {**variables["delta"], "~soft_prompt": {"prompt": prompt}}}
    x = np.asarray(params["words"]["embedding"])[TOKENS]
    total = (x * RIGHT[..., None]).sum(1, keepdims=True) + np.asarray(prompt).sum(0)
    wanted = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"] + total
    for given in ({"attention_mask": RIGHT}, {"attention_mask": RIGHT, "tokens": TOKENS}):
        args = () if "tokens" in given else (TOKENS,)
        np.testing.assert_allclose(tuned.apply(variables, params, *args, **given), wanted, atol=1e-6)
    with pytest.raises(InputError, match="cannot make room for its prompt in the argument weights="):
        tuned.apply(variables, params, TOKENS, weights=np.ones((2, 6)))
    with pytest.raises(InputError, match="give the model's inputs beside tokens by keyword"):
        tuned.apply(variables, params, TOKENS, RIGHT)


def mlp_by_hand(v):
    x = v["embedding"]
    for layer in range(3):
        x = x @ v[f"kernel_{layer}"] + v[f"bias_{layer}"]
        x = np.maximum(x, 0) if layer < 2 else x
    return x


def lstm_by_hand(v):
    def direction(x, name):
        h = c = np.zeros(v[f"{name}_hidden"].shape[0])
        states = []
        for row in x:
            i, f, g, o = np.split(row @ v[f"{name}_input"] + h @ v[f"{name}_hidden"] + v[f"{name}_bias"], 4)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            states.append(h)
        return np.array(states)

    x = v["embedding"]
    for layer in range(2):
        x = np.concatenate(
            [direction(x, f"forward_{layer}"), direction(x[::-1], f"backward_{layer}")[::-1]], 1
        )
    hidden = np.maximum(x @ v["kernel_0"] + v["bias_0"], 0)
    return hidden @ v["kernel_1"] + v["bias_1"]


@pytest.mark.parametrize("kind, by_hand", [("mlp", mlp_by_hand), ("lstm", lstm_by_hand)], ids=["mlp", "lstm"])
def test_an_encoder_makes_the_prompt_and_folds_away(kind, by_hand, tmp_path, x64):
    spec = {"": PromptEncoder(N, kind=kind, width=5), "attention": Prefix(2, reparameterise=4)}
    tuned, variables, params = tuned_model(spec, layers=2)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), variables["delta"])
    variables = {**variables, "delta": moved}
    plain, simple = folded(tuned, variables)
    own = jax.tree.map(np.asarray, moved["~prompt_encoder"])
    assert set(simple["delta"]) == {"~soft_prompt", "layers_0", "layers_1"}
    np.testing.assert_allclose(simple["delta"]["~soft_prompt"]["prompt"], by_hand(own), rtol=1e-12)
    assert jax.tree.map(jnp.shape, simple["delta"]["layers_0"]["attention"]["~prefix"]) == {
        "key": (2, 2, 4),
        "value": (2, 2, 4),
    }
    got = jax.jit(plain.apply)(simple, params, TOKENS)
    np.testing.assert_allclose(got, jax.jit(tuned.apply)(variables, params, TOKENS), rtol=0, atol=1e-12)
    save_delta(tmp_path, plain, simple, params)
    again, found = load_delta(tmp_path, plain.model, params)
    assert again == plain
    jax.tree.map(np.testing.assert_array_equal, found, simple)


def test_errors(x64):
    for make, said in (
        (lambda: SoftPrompt(0), "soft_prompt length=0 must be at least 1"),
        (lambda: SoftPrompt(3, initialisation="text"), "'text' is not one of vocabulary, uniform"),
        (lambda: SoftPrompt(3, initialisation="uniform", tokens=(1,)), "leave one of them out"),
        (lambda: PromptEncoder(3, kind="gru"), "kind='gru' is not one of mlp, lstm"),
        (lambda: PromptEncoder(3, width=-1), "width=-1 must be at least 0"),
        (lambda: tuned_model(SoftPrompt(3, tokens=(4, 50))), "tokens=50 is not in the vocabulary of 50"),
        (lambda: tuned_model(SoftPrompt(3, "words")), "embed='words' names 0 matrices"),
        (lambda: tuned_model({"mlp": SoftPrompt(3)}), "layers_0/mlp: SoftPrompt needs a model that takes"),
        (lambda: folded(*tuned_model(LoRA(2))[:2]), "folded: no entry is a prefix or prompt"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    tuned, variables, params = tuned_model(SoftPrompt(3))
    with pytest.raises(InputError, match="cannot make room for its prompt in the argument mask="):
        tuned.apply(variables, params, TOKENS, mask=Causal())


def test_adding_a_prompt_to_a_cached_call_compiles_once(x64):
    tuned, variables, params = tuned_model(SoftPrompt(N))
    traces = []

    @functools.partial(jax.jit)
    def step(variables, token, cache):
        traces.append(1)
        return tuned.apply(variables, params, token, cache=cache)

    cache = tuned.apply(variables, params, TOKENS[:, :3], cache=Cache.empty(2, 6))[1]
    cache = cache.replace(length=jnp.asarray(cache.length, jnp.int32))
    for column in (3, 4, 5):
        _, cache = step(variables, TOKENS[:, column : column + 1], cache)
    assert len(traces) == 1 and int(cache.length) == cache.capacity == 6 + N


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_text_after_a_prompt(scan, x64):
    """Rows of unequal lengths, padded on the left, against the full pass for each token of each row."""
    options = {"positions": Learned(64), "scan": scan, "layers": 2}
    tuned, variables, params = tuned_model({"": SoftPrompt(N), "attention": Prefix(2)}, **options)
    params = {**params, "embedding": {"table": 3 * params["embedding"]["table"]}}
    texts = [[5, 9, 3, 22], [7, 1], [30, 2, 2, 17, 40, 8]]
    model, whole = as_transformer(tuned, variables, params)
    found = [row.tolist() for row in generate(model, whole, texts, max_new_tokens=5).rows()]
    run = jax.jit(tuned.apply)
    for text, new in zip(texts, found):
        for token in new:
            row = np.array([text + [0] * (11 - len(text))])
            logits = run(variables, params, row, segments=(np.arange(11) < len(text))[None].astype(int))
            assert token == int(logits[0, len(text) - 1].argmax())
            text = [*text, token]
    assert found != [row.tolist() for row in generate(tuned.model, params, texts, max_new_tokens=5).rows()]


def test_folding_leaves_other_entries_as_they_are(x64):
    """What all arrays of an entry share stays one array."""
    tuned, variables, _ = tuned_model({"": [PromptEncoder(N, width=4), SAID(5)]})
    plain, simple = folded(tuned, variables)
    for part in ("delta", "delta_state"):
        other = only(variables, "said")[part]
        jax.tree.map(np.testing.assert_array_equal, only(simple, "said")[part], other)
    assert [entry.name for entry in plain.entries] == ["~soft_prompt", "~said"]
