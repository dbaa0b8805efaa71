"""The address language on paths of unrolled, scanned and patterned models."""

import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta.addresses import Address, Hit, select
from modicum.research.delta.folding import fold

UNROLLED = [
    f"layers_{i}/{name}"
    for i in range(12)
    for name in ("attention", "attention/query", "attention/value", "attention/key", "mlp/up")
] + ["", "classifier", "cross_attention/query"]
STACKED = {"layers": {"attention": {"query": {"kernel": np.zeros((6, 4, 4)), "bias": np.zeros((6, 4))}}}}
PERIODIC = {"layers": {f"layer_{j}": {"mlp": {"up": {"kernel": np.zeros((3, 4, 4))}}} for j in range(2)}}


def found(text, paths=UNROLLED, params=None, **options):
    options["exclude"] = tuple(Address(each) for each in options.get("exclude", ()))
    return select(Address(text), paths, params or {}, **options)


def test_plain_is_a_suffix_on_a_boundary():
    assert set(found("attention/query")) == {f"layers_{i}/attention/query" for i in range(12)}
    assert set(found("query")) == {
        *(f"layers_{i}/attention/query" for i in range(12)),
        "cross_attention/query",
    }
    with pytest.raises(InputError):
        found("tention/query")


def test_empty_address_is_the_root():
    assert list(found("")) == [""]


def test_alternatives():
    assert len(found("layers_3/attention/(query|value)")) == 2
    assert len(found("(layers_3/attention/query|classifier)")) == 2


@pytest.mark.parametrize(
    ("text", "layers"),
    [("{0-3}", [0, 1, 2, 3]), ("{0,3}", [0, 3]), ("{9-}", [9, 10, 11]), ("{1-2,5}", [1, 2, 5]), ("{7}", [7])],
)
def test_layer_ranges(text, layers):
    assert set(found(f"layers_{text}/mlp/up")) == {f"layers_{i}/mlp/up" for i in layers}


def test_numbers_may_be_whole_components():
    paths = [f"h/{i}/attn" for i in range(4)]
    assert set(found("h/{1-2}/attn", paths)) == {"h/1/attn", "h/2/attn"}
    stacked = {"h": {"attn": {"kernel": np.zeros((4, 2))}}}
    assert found("h/{1-2}/attn", ["h/attn"], stacked) == {"h/attn": Hit((1, 2), 4)}


def test_regular_expressions_end_with_the_path_and_keep_their_braces():
    assert set(found(r"re:layers_1\d/mlp/up")) == {"layers_10/mlp/up", "layers_11/mlp/up"}
    assert set(found(r"re:layers_\d{2}/mlp/up")) == {"layers_10/mlp/up", "layers_11/mlp/up"}
    with pytest.raises(InputError, match="names no module"):
        found(r"re:layers_1\d/mlp")
    with pytest.raises(InputError, match="names no module"):
        found(r"re:ayers_1\d/mlp/up")


def test_exclude_takes_the_same_language_and_everything_below():
    left = found("attention/(query|value)", exclude=["layers_{2-}", "value"])
    assert set(left) == {"layers_0/attention/query", "layers_1/attention/query"}
    with pytest.raises(InputError, match="leaves nothing"):
        found("mlp/up", exclude=["mlp"])


def test_stacked_layers_have_rows():
    path = "layers/attention/query"
    assert found("layers_{1-2,4}/attention/query", [path], STACKED) == {path: Hit((1, 2, 4), 6)}
    assert found("layers_{0-5}/attention/query", [path], STACKED) == {path: Hit()}
    assert found("attention/query", [path], STACKED) == {path: Hit()}
    excluded = found("attention/query", [path], STACKED, exclude=["layers_{0-3}"])
    assert excluded == {path: Hit((4, 5), 6)}
    assert found("layers_{2-}/attention", [path], STACKED, above=True) == {path: Hit((2, 3, 4, 5), 6)}


def test_stacked_patterns_count_layers_and_not_rows():
    paths = [f"layers/layer_{j}/mlp/up" for j in range(2)]
    hits = found("layers_{1-3}/mlp/up", paths, PERIODIC)
    assert hits == {paths[0]: Hit((1,), 3), paths[1]: Hit((0, 1), 3)}


def test_a_module_that_merely_shares_the_name_is_no_stack():
    params = {"dense": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}
    with pytest.raises(InputError, match="names no module"):
        found("dense_{0-1}", ["dense"], params)


@pytest.mark.parametrize(
    ("text", "paths", "params"),
    [
        ("layers_{0-12}/mlp/up", UNROLLED, {}),
        ("layers_{4,6}/attention/query", ["layers/attention/query"], STACKED),
        ("layers_{0-6}/mlp/up", ["layers/layer_0/mlp/up", "layers/layer_1/mlp/up"], PERIODIC),
    ],
)
def test_a_layer_that_is_not_there(text, paths, params):
    with pytest.raises(InputError, match=r"names layer (12|6); the model has layers 0-(11|5)"):
        found(text, paths, params)


@pytest.mark.parametrize(
    "text", ["layers_{3-1}", "layers_{}", "layers_{a}", "layers_{0}/x_{1}", "/x", "x/", "(a", "re:(a"]
)
def test_malformed(text):
    with pytest.raises(InputError, match="delta address"):
        Address(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("layer_{0-3}/attention/query", "layers_{0-11}/attention/query"),
        ("attention/querry", "attention/query"),
        ("layers_0.attention.query", "attention/query"),
        ("clasifier", "classifier"),
    ],
)
def test_nothing_matched_is_an_error_with_near_misses(text, near):
    with pytest.raises(InputError, match="near misses") as caught:
        found(text)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folding_keeps_gaps():
    paths = ["a", *(f"layers_{i}/x_0" for i in (0, 1, 2, 5)), "layers_1/y"]
    assert list(fold(paths)) == ["a", "layers_{0-2,5}/x_0", "layers_1/y"]
