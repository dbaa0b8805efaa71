"""The loss in chunks and over split words is the plain one, and holds and moves what it should."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modicum import InputError
from modicum.models import ClassifierHead, LanguageModelHead, Transformer, TransformerConfig, chunked_loss
from modicum.models.heads import DeferredHead, MaskedLanguageModelHead
from modicum.models.losses import cross_entropy, weighted_correct
from modicum.models.word_losses import UNSPLIT, WordSplit, chunk_size, word_loss_sums
from modicum.models.word_scores import WordScores
from modicum.parallel import MeshShape, make_mesh
from modicum.parallel.plan.hlo import Program

B, T, D, V, WORDS = 8, 6, 16, 24, 21  # three rows of the table pad it
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


def split(mesh):
    return WordSplit(make_mesh(MeshShape.parse(mesh))) if mesh else UNSPLIT


def case(dtype):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in ((B, T, D), (V, D), (V,))]
    targets, shares = rng.integers(0, WORDS, (B, T)), rng.random((B, T)).astype(dtype)
    return (*arrays, jnp.asarray(targets).at[0].set(3), jnp.asarray(shares).at[:, -1].set(0))


def value_and_gradients(chunk, split=UNSPLIT, across=False, smoothing=0.0, dtype="float64"):
    """Sums, and gradients of three times the total by hidden states, words, bias and the tokens' weights."""
    *factors, targets, shares = case(dtype)

    def loss(hidden, words, bias, shares):
        hidden = hidden.at[0].set(2 * words[3])  # hits, of words 3 and 5 that tie the first, for target 3
        words = words.at[5].set(words[3]).T if across else words.at[5].set(words[3])
        scores = WordScores(hidden, words, bias.at[5].set(bias[3]), across, WORDS, 0.7, dtype)
        sums = word_loss_sums(scores, targets, shares, smoothing=smoothing, chunk=chunk, split=split)
        return 3 * sums.total, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*factors, shares)


@pytest.fixture(scope="module")
def whole():
    return cache(lambda across, smoothing: value_and_gradients(0, UNSPLIT, across, smoothing))


@pytest.mark.parametrize(
    ("mesh", "chunk", "across", "smoothing"),
    [
        ("", 5, False, 0.1),
        ("", 1, True, 0.0),
        ("data=2,tensor=4", 5, False, 0.1),
        ("tensor=8", 48, True, 0.0),
        ("data=2,fsdp=2,context=2", 4, True, 0.1),
    ],
)
def test_chunks_and_split_words_change_nothing(whole, mesh, chunk, across, smoothing, x64):
    expected, found = whole(across, smoothing), value_and_gradients(chunk, split(mesh), across, smoothing)
    assert expected[0][1].correct > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, expected)


def test_chunks_are_whole_tiles(whole, monkeypatch, x64):
    for tokens, chunk, cut in (
        (2**15, 5336, (7, 4736)),  # GPT-3's on a v5p of 64: TPUs' compiler takes minutes for 7 of 4682
        (300, 200, (3, 128)),
        (300, 100, (3, 100)),
    ):
        rows = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
        assert jax.eval_shape(partial(chunked_loss._cut, chunk=chunk), rows).shape == (*cut, D)
    monkeypatch.setattr(chunked_loss, "TILE", 5)
    # 48 tokens in 5 chunks of 10
    expected, found = whole(False, 0.1), value_and_gradients(12, smoothing=0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_as_near_to_exact_as_plain_ones(dtype, x64):
    half = jnp.dtype(dtype)

    def gradients(chunk):
        *factors, targets, shares = case("float64")
        hidden, words, bias = (x.astype(half) for x in factors)

        def loss(hidden, words):
            scores = WordScores(hidden, words.at[5].set(words[3]), bias, False, WORDS, 0.7, "float32")
            return word_loss_sums(scores, targets, shares, chunk=chunk).total

        return jax.grad(loss, argnums=(0, 1))(hidden, words)

    plain, chunked = gradients(0), gradients(5)
    for a, b in zip(plain, chunked):
        assert a.dtype == b.dtype == half
        wide = [np.asarray(x, np.float64) for x in (a, b)]
        assert np.linalg.norm(wide[0] - wide[1]) < 3 * float(jnp.finfo(half).eps) * np.linalg.norm(wide[0])


def programs(mesh, chunk):
    """The compiled gradient in single precision, its factors where training has them."""
    where = make_mesh(MeshShape.parse(mesh))

    def place(*spec):
        return NamedSharding(where, PartitionSpec(*spec))

    def loss(hidden, words, targets, shares):
        scores = WordScores(hidden, words, None, False, 4096, 1.0, "float32")
        return word_loss_sums(scores, targets, shares, chunk=chunk, split=WordSplit(where)).total

    rows = place("data")
    shapes = jax.eval_shape(
        lambda: (jnp.zeros((16, 64, 8)), jnp.zeros((4096, 8)), jnp.zeros((16, 64), int), jnp.zeros((16, 64)))
    )
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(rows, place("tensor"), rows, rows),
        out_shardings=(place(), (rows, place("tensor"))),
    )
    return step.lower(*shapes).compile()


def moved(compiled):
    """Sizes of the results of all collectives, by kind."""
    found = [
        (one.opcode.removesuffix("-start"), array.sizes)
        for computation in Program.parse(compiled.as_text()).computations.values()
        for one in computation.instructions
        for array in one.arrays
    ]
    return {kind: [sizes for name, sizes in found if name == kind] for kind in COLLECTIVES}


def test_logits_are_never_gathered_nor_held():
    """Logits of a device: 8 rows x 64 tokens x 1024 of 4096 words; in chunks of 32 tokens a sixteenth."""
    whole, chunked = programs("data=2,tensor=4", 0), programs("data=2,tensor=4", 32)
    for compiled in (whole, chunked):
        kinds = moved(compiled)
        assert not kinds["all-gather"] and not kinds["all-to-all"] and not kinds["collective-permute"]
        assert kinds["all-reduce"]  # of sums over words, hidden states and the table's rows: no logits
        assert all(1024 not in sizes or sizes == (1024, 8) for sizes in kinds["all-reduce"])
    logits = 4 * 8 * 64 * 1024
    held = [compiled.memory_analysis().temp_size_in_bytes for compiled in (whole, chunked)]
    print(f"a device's logits {logits}, temporaries whole {held[0]}, in chunks {held[1]} bytes")
    assert held[0] > logits > 4 * held[1]


def test_a_deferred_head_has_the_parameters_and_logits_of_its_head():
    tokens, rng = jnp.arange(6).reshape(2, 3), jax.random.key(0)
    config = TransformerConfig(layers=1, width=24, vocab=7, vocab_multiple=4, tied=False, logit_scale=0.5)
    for head in (LanguageModelHead(), MaskedLanguageModelHead()):
        plain, deferred = Transformer(config, head), Transformer(config, DeferredHead(head))
        params = jax.jit(plain.init)(rng, tokens)
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(deferred.init, rng, tokens))
        scores = deferred.apply(params, tokens)
        np.testing.assert_array_equal(scores.logits(), plain.apply(params, tokens))


def test_chunks_are_automatic_where_logits_are_large():
    def scores(words):
        return WordScores(jnp.zeros((1, 1, 8)), jax.ShapeDtypeStruct((words, 8), jnp.float32))

    assert chunk_size(scores(2048), (32, 128), None, UNSPLIT) == 0  # 32 MiB
    assert chunk_size(scores(2**16), (32, 128), None, UNSPLIT) == 2**10  # of 1 GiB as much as 256 MiB
    assert chunk_size(scores(2**16), (32, 128), None, split("data=2,tensor=4")) == 0  # 128 MiB a device
    assert chunk_size(scores(2**16), (32, 128), 0, UNSPLIT) == 0
    assert chunk_size(scores(2048), (32, 128), 64, UNSPLIT) == 64


def test_bad_input_is_named():
    scores = WordScores(jnp.zeros((6, 4, 8)), jnp.zeros((16, 8)), vocab=16)
    given = jnp.zeros((6, 4), int), jnp.ones((6, 4))
    with pytest.raises(
        InputError, match=r"^the loss in chunks: 6 rows do not divide over data=8; use a mult"
    ):
        word_loss_sums(scores, *given, chunk=2, split=split("data=8"))
    with pytest.raises(InputError, match=r"^loss_chunk=-1 tokens; give at least 1, or 0 for all"):
        word_loss_sums(scores, *given, chunk=-1)
    with pytest.raises(
        InputError, match=r"^ClassifierHead scores no words; only such a head can be deferred$"
    ):
        DeferredHead(ClassifierHead(2))


def test_plain_sums_are_those_of_the_logits():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 5)), jnp.float32)
    targets, shares = jnp.asarray([[0, 4, 2], [1, 1, 3]]), jnp.asarray([[1.0, 0, 0.5], [1, 1, 0]])
    sums = word_loss_sums(logits, targets, shares)
    np.testing.assert_allclose(sums.total, (cross_entropy(logits, targets) * shares).sum(), rtol=1e-6)
    assert (sums.weight, sums.correct) == (3.5, weighted_correct(logits, targets, shares))
