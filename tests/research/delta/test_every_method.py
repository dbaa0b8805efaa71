"""What holds for every delta method: add a row to `CASES` for each."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.models.attention import GroupedQuery
from modicum.models.precision import FP32, FP64, Precision
from modicum.models.transformer import Transformer, TransformerConfig
from modicum.research.delta import (
    IA3,
    OFT,
    SAID,
    AdaLoRA,
    Adapter,
    BitFit,
    Compacter,
    DiffPruning,
    DoRA,
    Full,
    LayerNormTuning,
    LoRA,
    LowRankAdapter,
    ParallelAdapter,
    Prefix,
    PromptEncoder,
    RandomSubset,
    SoftPrompt,
    VeRA,
    attach,
    load_delta,
    save_delta,
)
from modicum.research.delta.methods import Method, SiteMethod

BF16 = Precision("bfloat16", "bfloat16", "float32")
LAYERS, WIDTH, VOCAB = 3, 16, 50
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (2, 6))
QV = "attention/(query|value)"

pytestmark = pytest.mark.usefixtures("quick_compile")


class Case(NamedTuple):
    """A method and what is to hold of it.

    `start`: at step 0 the output is "identical" to the backbone's, "close" to it (up to rounding), or
    "elsewhere". `ranged`: it can be confined to layers 0 and 2 of a scanned stack. `scans`: a scanned
    layer starts from the numbers that the unrolled one would. `merges`, `unmerges`, `scales`: what the
    method can do; what it cannot must be an error.
    """

    name: str
    method: Method
    address: str = QV
    start: str = "identical"
    ranged: bool = True
    scans: bool = True
    merges: bool = True
    unmerges: bool = True
    scales: bool = True


CASES = [
    # A: the low-rank family
    Case("lora", LoRA(2)),
    Case("lora-stabilised-gaussian", LoRA(2, rank_stabilised=True, initialisation="gaussian")),
    Case("lora-pissa", LoRA(2, initialisation="pissa"), "mlp/(up|down)", scales=False),
    Case("lora-olora", LoRA(2, initialisation="olora"), "mlp/(up|down)", scales=False),
    Case("dora", DoRA(2), unmerges=False, scales=False),
    Case("adalora", AdaLoRA(2)),
    Case("vera", VeRA(4)),
    Case("oft", OFT(4), scales=False),
    Case("oft-neumann", OFT(4, neumann_terms=5), scales=False),
    # B: adapters, IA3, prefix and prompts
    Case("adapter", Adapter(3), "mlp/down", merges=False, unmerges=False),
    Case("parallel adapter", ParallelAdapter(3, scale=2.0), "mlp", merges=False, unmerges=False),
    Case("low-rank adapter", LowRankAdapter(4, 2), "mlp/down", merges=False, unmerges=False),
    Case("compacter", Compacter(4, 2), "mlp/down", merges=False, unmerges=False),
    Case("fixed rule", Compacter(4, 2, 2, "relu", True, False), "mlp", merges=False, unmerges=False),
    Case("ia3", IA3(), "attention/(key|value)"),
    Case("ia3 on input", IA3("input"), "mlp/down"),
    Case("prefix", Prefix(3), "attention", "elsewhere", merges=False, unmerges=False, scales=False),
    Case("prefix mlp", Prefix(3, 4), "attention", "elsewhere", merges=False, unmerges=False, scales=False),
    Case("soft prompt", SoftPrompt(4), "", "elsewhere", False, merges=False, unmerges=False, scales=False),
    Case("encoder", PromptEncoder(4), "", "elsewhere", False, merges=False, unmerges=False, scales=False),
    # C: methods on arrays
    Case("bitfit", BitFit(), ""),
    Case("layer norm", LayerNormTuning(), ""),
    Case("random subset", RandomSubset(0.1), "mlp", ranged=False, scans=False),
    Case("diff pruning", DiffPruning(start=0.5), ""),
    Case("grouped diff pruning", DiffPruning(start=0.5, group=True), "mlp", ranged=False, scans=False),
    Case("said", SAID(20), "mlp", ranged=False, scans=False),
    Case("full", Full(), "mlp", unmerges=False, scales=False),
]

every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def decoder(precision=FP32, scan=False):
    attention = GroupedQuery(4, 2)
    config = TransformerConfig(
        layers=LAYERS, width=WIDTH, vocab=VOCAB, attention=attention, precision=precision, scan=scan
    )
    return Transformer(config=config)


@functools.cache
def backbone():
    """Parameters of the unrolled decoder, biases and scales away from 0 and 1, as NumPy arrays."""
    params = jax.jit(decoder().init)(jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape), params)


def params_in(dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), backbone())


def stacked(tree):
    """The tree of the scanned model: `layers_0`, `layers_1`, ... as rows of `layers`."""
    names = sorted((name for name in tree if name.startswith("layers_")), key=lambda name: int(name[7:]))
    if not names:
        return dict(tree)
    rest = {name: node for name, node in tree.items() if name not in names}
    return {**rest, "layers": jax.tree.map(lambda *rows: jnp.stack(rows), *(tree[name] for name in names))}


def moved(variables, scale=0.2):
    """The delta away from its start, as training would leave it."""
    rng = np.random.default_rng(3)
    trained = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), variables["delta"]
    )
    return {**variables, "delta": trained}


@functools.cache
def untuned(precision, scan=False):
    """The model, its parameters and its output."""
    model, params = decoder(precision, scan), params_in(precision.param)
    params = stacked(params) if scan else params
    return model, params, model.apply(params, TOKENS)


@functools.cache
def set_up(case, address=None, precision=FP64, scan=False):
    """Tuned model, variables at the start, parameters."""
    model, params, _ = untuned(precision, scan)
    tuned = attach(model, {case.address if address is None else address: case.method})
    return tuned, tuned.init(jax.random.key(1), params, TOKENS), params


def some_loss(outputs):
    return jnp.sin(outputs).sum()


@functools.cache
def loss_and_gradient(case):
    """Of the delta away from its start, in double precision."""
    tuned, variables, params = set_up(case)
    variables, state = moved(variables), variables["delta_state"]

    def loss(delta):
        return some_loss(tuned.apply({"delta": delta, "delta_state": state}, params, TOKENS))

    return jax.value_and_grad(loss)(variables["delta"])


def assert_close(got, wanted, tolerance=1e-9):
    """Equal leaf by leaf, relative to each leaf's largest value."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        scale = float(jnp.abs(other).max()) if other.size else 0.0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(scale, 1e-6))


@every
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_where_training_starts(case, scan):
    tuned, variables, params = set_up(case, precision=FP32, scan=scan)
    base, start = untuned(FP32, scan)[2], tuned.apply(variables, params, TOKENS)
    if case.start == "identical":
        np.testing.assert_array_equal(start, base)
    elif case.start == "close":
        assert_close(start, base, 1e-5)
    assert jnp.isfinite(start).all()


@every
def test_every_variable_trains(case, x64):
    largest = {}
    for path, leaf in flatten_dict(loss_and_gradient(case)[1]).items():
        assert jnp.isfinite(leaf).all()
        largest[path[-1]] = max(largest.get(path[-1], 0.0), float(jnp.abs(leaf).max()))
    assert largest and min(largest.values()) > 1e-9


@every
def test_scanned_layers_start_as_unrolled_ones(case):
    if not case.scans:
        pytest.skip("draws for a stack as a whole")
    one, two = (set_up(case, precision=FP32, scan=scan)[1] for scan in (False, True))
    assert_close(two["delta"], stacked(one["delta"]), 1e-5)
    assert_close(two["delta_state"], stacked(one["delta_state"]), 1e-5)


@every
def test_a_layer_range_of_a_scan_is_that_of_the_unrolled_model(case, x64):
    """Only the rows are stored; the layers that are left out compute what they did."""
    if not case.ranged:
        pytest.skip("acts at no layer of a stack")
    address = f"layers_{{0,2}}/{case.address}".rstrip("/")
    tuned, variables, params = set_up(case, address)
    model, stack, _ = untuned(FP64, scan=True)
    scanned, variables = attach(model, {address: case.method}), moved(variables)
    made = jax.eval_shape(scanned.init, jax.random.key(1), stack, TOKENS)
    rows = {part: stacked(variables[part]) for part in variables}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (made, rows))
    assert shapes[0] == shapes[1]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(made))
    wanted = tuned.apply(variables, params, TOKENS)
    assert_close(scanned.apply(rows, stack, TOKENS), wanted)
    assert jnp.abs(wanted - untuned(FP64)[2]).max() > 1e-4
    if case.merges:
        merged = scanned.merge(stack, rows)
        assert_close(merged, stacked(tuned.merge(params, variables)))
        untouched, before = (jax.tree.map(lambda leaf: leaf[1], tree["layers"]) for tree in (merged, stack))
        jax.tree.map(np.testing.assert_array_equal, untouched, before)


@every
def test_merging(case, x64):
    """Merged weights compute the same; their gradients by the delta's variables are the delta's own."""
    tuned, variables, params = set_up(case)
    variables, state = moved(variables), variables["delta_state"]
    if not case.merges:
        with pytest.raises(InputError, match="cannot be merged"):
            tuned.merge(params, variables)
        return

    def through_the_weights(delta):
        merged = tuned.merge(params, {"delta": delta, "delta_state": state})
        return some_loss(tuned.model.apply(merged, TOKENS))

    value, got = loss_and_gradient(case)
    oracle, wanted = jax.value_and_grad(through_the_weights)(variables["delta"])
    np.testing.assert_allclose(value, oracle, rtol=1e-9)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        size = max(float(jnp.linalg.norm(other)), 1e-6)
        assert float(jnp.linalg.norm(one - other)) <= 1e-6 * size
    merged = tuned.merge(params, variables)
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda leaf: leaf.dtype, params)
    if case.unmerges:
        assert_close(tuned.unmerge(merged, variables), params, 1e-8)
    else:
        with pytest.raises(InputError, match="cannot be taken out"):
            tuned.unmerge(merged, variables)


def scaled(case, delta, factor):
    """`delta` scaled by its method, place by place."""
    return {
        name: case.method.scaled(node, factor) if name.startswith("~") else scaled(case, node, factor)
        for name, node in delta.items()
    }


@every
def test_scaling(case, x64):
    """Scaled by 0 nothing is left; by another factor, the weights change by so many times as much."""
    tuned, variables, params = set_up(case)
    variables = moved(variables)
    if not case.scales:
        with pytest.raises(InputError, match="cannot be scaled"):
            scaled(case, variables["delta"], 0.5)
        return
    none = {**variables, "delta": scaled(case, variables["delta"], 0.0)}
    assert_close(tuned.apply(none, params, TOKENS), untuned(FP64)[2])
    if case.merges:
        third = {**variables, "delta": scaled(case, variables["delta"], 0.3)}
        change = jax.tree.map(lambda new, old: new - old, tuned.merge(params, variables), params)
        wanted = jax.tree.map(lambda old, added: old + 0.3 * added, params, change)
        assert_close(tuned.merge(params, third), wanted)


@every
def test_a_stored_delta_comes_back(case, tmp_path):
    tuned, variables, params = set_up(case, precision=FP32)
    variables = moved(variables)
    folder = save_delta(tmp_path / case.name, tuned, variables, params)
    again, found = load_delta(folder, tuned.model, params)
    assert again.entries == tuned.entries
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    np.testing.assert_array_equal(again.apply(found, params, TOKENS), tuned.apply(variables, params, TOKENS))


@every
def test_a_bfloat16_backbone(case):
    """The delta keeps single precision (except for copies of the backbone's arrays), the outputs theirs."""
    tuned, variables, params = set_up(case, precision=BF16)
    if isinstance(case.method, SiteMethod):
        floats = [leaf for leaf in jax.tree.leaves(variables) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    base, start = untuned(BF16)[2], tuned.apply(variables, params, TOKENS)
    assert start.dtype == base.dtype
    if case.start == "identical":
        np.testing.assert_array_equal(start, base)
    after = tuned.apply(moved(variables), params, TOKENS)
    assert jnp.isfinite(after).all() and jnp.abs(after - base).max() > 1e-3
    if case.merges:
        merged = tuned.merge(params, moved(variables))
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
