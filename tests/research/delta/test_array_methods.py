"""Norm tuning, last layers, random subsets, diff pruning and SAID: what is particular to each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.research.delta import (
    SAID,
    BitFit,
    DiffPruning,
    Full,
    LayerNormTuning,
    RandomSubset,
    SparseOffset,
    attach,
    attach_leaves,
    last_layers,
    load_delta,
    parameter_count,
    project,
    save_delta,
    summary,
)
from modicum.research.delta.diff_pruning import hard_concrete, open_probability
from modicum.research.delta.intrinsic import fastfood, hadamard, permutations
from modicum.research.delta.leaves import FunctionModel
from modicum.research.training.objectives import LossSums, penalised

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
PARAMS = jax.tree.map(
    lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
    {"layers": {"kernel": (3, 4, 4), "bias": (3, 4)}, "head": {"kernel": (4, 2), "bias": (2,)}},
    is_leaf=lambda node: isinstance(node, tuple),
)


def network(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["layers"]["kernel"][i] + params["layers"]["bias"][i])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def made(method, address="", params=PARAMS):
    tuned = attach_leaves(network, {address: method})
    return tuned, tuned.init(jax.random.key(1), params)


def moved(variables, scale=0.3):
    rng = np.random.default_rng(2)
    delta = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), variables["delta"]
    )
    return {**variables, "delta": delta}


# --- norms


@pytest.mark.parametrize(
    "path",
    [
        "layers_0/attention_norm/scale",
        "layers/mlp_norm/bias",
        "encoder/final_norm/scale",
        "layers/attention/query_norm/scale",
        "LayerNorm_0/bias",
        "block/RMSNorm/scale",
        "h/3/ln_1/scale",
        "ln_f/bias",
        "encoder/layer/0/output/LayerNorm/weight",
        "norm1/scale",
        "layer_norm/offset",
    ],
)
def test_norms_are_known_by_their_names(path):
    assert LayerNormTuning().accepts(path)


@pytest.mark.parametrize(
    "path",
    ["layers_0/mlp/up/bias", "normaliser/scale", "scale", "final_norm/kernel", "kiln/scale", "ln_1/up/bias"],
)
def test_what_is_no_norm_is_left_alone(path):
    assert not LayerNormTuning().accepts(path)


def test_norm_tuning_takes_norms_alone_and_says_where_there_are_none(decoder, tokens):
    model = decoder(layers=2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    delta = attach(model, LayerNormTuning()).init(jax.random.key(0), params)["delta"]
    assert parameter_count(delta) == 2 * (2 * 2 * 16) + 2 * 16
    with pytest.raises(InputError, match="LayerNormTuning at '': none of the 4 arrays there fits"):
        made(LayerNormTuning())


# --- last layers


def tree_of(*paths):
    tree = {}
    for path in paths:
        node = tree
        *above, name = path.split("/")
        for part in above:
            node = node.setdefault(part, {})
        node[name] = jnp.zeros((12, 2))
    return tree


@pytest.mark.parametrize(
    ("paths", "options", "wanted"),
    [
        ([f"layers_{i}/up/kernel" for i in range(12)], {"count": 2}, ["layers_{10-}"]),
        (["layers/up/kernel", "layers/up/bias", "head/bias"], {"count": 2}, ["layers_{10-}"]),
        (["layers/layer_0/up/kernel", "layers/layer_1/up/kernel"], {"count": 3}, ["layers_{21-}"]),
        ([f"layers/{i}/up/kernel" for i in range(3)], {}, ["layers/{2-}"]),
        (
            [f"{side}/layers_{i}/k" for side, n in (("encoder", 4), ("decoder", 6)) for i in range(n)],
            {"count": 2},
            ["encoder/layers_{2-}", "decoder/layers_{4-}"],
        ),
        (
            ["encoder/layers/up/kernel", "decoder/layers/up/kernel"],
            {"count": 1, "stack": "decoder/layers"},
            ["decoder/layers_{11-}"],
        ),
        ([f"transformer/h_{i}/k" for i in range(2)], {"stack": "h"}, ["transformer/h_{1-}"]),
    ],
)
def test_last_layers_are_addressed_from_the_end(paths, options, wanted):
    assert last_layers(tree_of(*paths), **options) == dict.fromkeys(wanted, Full())


def test_last_layers_tune_these_and_nothing_else():
    tuned = attach_leaves(network, last_layers(PARAMS, 2))
    variables = moved(tuned.init(jax.random.key(0), PARAMS))
    assert parameter_count(variables["delta"]) == 2 * (16 + 4)
    merged = tuned.merge(PARAMS, variables)
    np.testing.assert_array_equal(merged["layers"]["kernel"][0], PARAMS["layers"]["kernel"][0])
    np.testing.assert_array_equal(merged["head"]["kernel"], PARAMS["head"]["kernel"])
    assert jnp.abs(merged["layers"]["kernel"][1:] - PARAMS["layers"]["kernel"][1:]).min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4}, "count=4 is not between 1 and the 3 layers of layers"),
        ({"count": 0}, "count=0 is not between 1"),
        ({"stack": "layer"}, "no layers are called 'layer'; near misses: layers"),
    ],
)
def test_layers_that_are_not_there_are_an_error(options, message):
    with pytest.raises(InputError, match=message):
        last_layers(PARAMS, **options)


# --- random subsets


def test_a_random_subset_moves_its_positions_and_no_others():
    tuned, variables = made(RandomSubset(0.25))
    moved_ = moved(variables)
    sizes = {"layers/kernel": 12, "layers/bias": 3, "head/kernel": 2, "head/bias": 1}
    merged = tuned.merge(PARAMS, moved_)
    for path, count in sizes.items():
        above, name = path.split("/")
        index = variables["delta_state"][above][name]["~random_subset"]["index"]
        assert index.shape == (count,) and index.dtype == jnp.int32
        assert (np.diff(index) > 0).all()  # drawn without replacement
        changed = np.flatnonzero(np.asarray(merged[above][name] != PARAMS[above][name]))
        np.testing.assert_array_equal(changed, index)
        offset = moved_["delta"][above][name]["~random_subset"]["offset"]
        wanted = np.asarray(PARAMS[above][name]).reshape(-1)[index] + offset
        np.testing.assert_array_equal(merged[above][name].reshape(-1)[index], wanted)


def test_a_random_subset_trains_as_masked_full_tuning():
    tuned, variables = made(RandomSubset(count=2))
    ours = jax.grad(lambda v: network(tuned.merge(PARAMS, {**variables, "delta": v}), X).sum())
    full = jax.grad(lambda params: network(params, X).sum())(PARAMS)
    for (above, name), gradient in {
        (a, n): node["~random_subset"]["offset"]
        for a, below in ours(variables["delta"]).items()
        for n, node in below.items()
    }.items():
        index = variables["delta_state"][above][name]["~random_subset"]["index"]
        np.testing.assert_allclose(gradient, full[above][name].reshape(-1)[index], rtol=1e-5)


def test_rows_of_a_layer_range_are_one_array():
    tuned, variables = made(RandomSubset(0.5), "layers_{1-}")
    assert variables["delta"]["layers"]["kernel"]["~random_subset"]["offset"].shape == (16,)
    merged = tuned.merge(PARAMS, moved(variables))
    np.testing.assert_array_equal(merged["layers"]["kernel"][0], PARAMS["layers"]["kernel"][0])
    assert (merged["layers"]["kernel"][1:] != PARAMS["layers"]["kernel"][1:]).sum() == 16


def test_random_subsets_differ_by_seed_and_array():
    params = {"one": jnp.ones(40), "two": jnp.ones(40)}
    tuned = attach_leaves(network, {"": RandomSubset(0.5)})
    drawn = [
        tuple(tuned.init(jax.random.key(i), params)["delta_state"][name]["~random_subset"]["index"].tolist())
        for i in (1, 2)
        for name in params
    ]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomSubset(0.0), "fraction=0.0 must be above 0"),
        (lambda: RandomSubset(count=0), "count=0 must be at least 1"),
        (lambda: made(RandomSubset(count=3), "head/bias"), "3 positions of an array \\(2,\\) of 2 numbers"),
        (lambda: made(SparseOffset()), "it is what diff_pruning.project returns"),
        (lambda: DiffPruning(sparsity=-1.0), "sparsity=-1.0 must be at least 0"),
        (lambda: SAID(0), "dimension=0 must be at least 1"),
    ],
    ids=["fraction", "count", "small array", "sparse", "sparsity", "dimension"],
)
def test_what_cannot_be_is_an_error(build, message):
    with pytest.raises(InputError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


# --- diff pruning


def test_gates_are_hard_concrete():
    """Means and masses against Louizos et al. (2018): P(z > 0) = sigmoid(log_alpha) for (-1.5, 1.5)."""
    log_alpha = jnp.linspace(-2.0, 2.0, 5)[:, None] * jnp.ones((1, 20_000))
    gates = hard_concrete(log_alpha, jax.random.key(0))
    assert gates.min() == 0.0 and gates.max() == 1.0
    np.testing.assert_allclose((gates > 0).mean(1), jax.nn.sigmoid(log_alpha[:, 0]), atol=0.015)
    np.testing.assert_allclose(open_probability(log_alpha[:, 0]), jax.nn.sigmoid(log_alpha[:, 0]), rtol=1e-6)
    np.testing.assert_allclose(hard_concrete(jnp.array([-9.0, 0.5, 9.0])), [0.0, 0.3673780, 1.0], atol=1e-6)


def test_gates_are_drawn_in_training_and_fixed_in_evaluation():
    tuned, variables = made(DiffPruning(start=0.0, group=True))
    variables = moved(variables, 0.5)
    train = [tuned.apply(variables, PARAMS, X, rng=jax.random.key(i), train=True) for i in (1, 1, 2)]
    np.testing.assert_array_equal(train[0], train[1])
    assert jnp.abs(train[0] - train[2]).max() > 0
    still = tuned.apply(variables, PARAMS, X)
    np.testing.assert_array_equal(still, tuned.apply(variables, PARAMS, X, rng=jax.random.key(3)))
    np.testing.assert_array_equal(still, network(tuned.merge(PARAMS, variables), X))
    with pytest.raises(InputError, match="DiffPruning draws at random"):
        tuned.apply(variables, PARAMS, X, train=True)


@pytest.mark.parametrize("group", [False, True])
def test_the_penalty_is_the_expected_number_of_open_gates(group):
    tuned, variables = made(DiffPruning(sparsity=0.5, start=-1.0, group=group))
    open_ = jax.nn.sigmoid(-1.0)
    wanted = 0.5 * parameter_count(PARAMS) * open_ * (open_ if group else 1.0)
    np.testing.assert_allclose(tuned.penalty(variables), wanted, rtol=1e-5)


def test_the_penalty_closes_gates_that_the_loss_does_not_need():
    """Trained with the penalty, only the difference that the task needs stays open."""
    params = {"w": jnp.zeros(8)}
    tuned = attach_leaves(lambda params: params["w"], {"w": DiffPruning(sparsity=0.3, start=2.0)})
    variables = tuned.init(jax.random.key(0), params)
    target = jnp.array([2.0, -2.0, 0, 0, 0, 0, 0, 0])

    def squares(trainable, frozen, batch, rng):
        variables_ = {"delta": trainable, "delta_state": frozen["delta_state"]}
        made_ = tuned.apply(variables_, frozen["params"], rng=rng, train=rng is not None)
        return LossSums(((made_ - target) ** 2).sum(), jnp.ones(()), {})

    loss = penalised(squares, tuned)
    frozen = {"params": params, "delta_state": variables["delta_state"]}

    @jax.jit
    def step(delta, key):
        gradient = jax.grad(lambda delta: loss(delta, frozen, {}, key).total)(delta)
        return jax.tree.map(lambda leaf, g: leaf - 0.3 * g, delta, gradient)

    delta = variables["delta"]
    for key in jax.random.split(jax.random.key(1), 300):
        delta = step(delta, key)
    gates = np.asarray(hard_concrete(delta["w"]["~diff_pruning"]["log_alpha"]))
    assert (gates[:2] > 0.9).all() and (gates[2:] == 0).all()


def test_projection_keeps_the_largest_of_the_whole_model_exactly():
    tuned = attach_leaves(network, {"layers": DiffPruning(start=0.5), "head": [DiffPruning(), BitFit()]})
    variables = moved(tuned.init(jax.random.key(1), PARAMS), 0.5)
    sparse, kept = project(tuned, variables, 0.2)
    assert [entry.name for entry in sparse.entries] == ["~sparse_offset", "~sparse_offset_1", "~bitfit"]
    total = parameter_count(PARAMS)
    arrays = [
        node[name]
        for part in kept["delta"].values()
        for node in part.values()
        for name in node
        if "sparse" in name
    ]
    assert sum(array["offset"].size for array in arrays) == round(0.2 * total)
    dense = jax.tree.map(lambda new, old: new - old, tuned.merge(PARAMS, variables), PARAMS)
    thin = jax.tree.map(lambda new, old: new - old, sparse.merge(PARAMS, kept), PARAMS)
    bias = variables["delta"]["head"]["bias"]["~bitfit"]["offset"]
    for tree in (dense, thin):
        tree["head"]["bias"] = tree["head"]["bias"] - bias
    left, all_ = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (thin, dense)
    )
    stays = np.abs(left) > 1e-6
    np.testing.assert_allclose(left[stays], all_[stays], atol=1e-6)
    assert np.abs(all_[stays]).min() >= np.abs(all_[~stays]).max() - 1e-6
    assert stays.sum() == round(0.2 * total)


def test_a_projected_delta_is_small_trains_and_comes_back(tmp_path):
    params = {"layers": {"kernel": jnp.ones((3, 64, 64)), "bias": jnp.ones((3, 64))}, "head": PARAMS["head"]}
    tuned, variables = made(DiffPruning(), params=params)
    variables = moved(variables)
    sparse, kept = project(tuned, variables, 0.005)
    folder = save_delta(tmp_path, sparse, kept, params)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert stored < 8 * 0.005 * parameter_count(params) + 1000
    again, found = load_delta(folder, FunctionModel(network), params)
    jax.tree.map(np.testing.assert_array_equal, again.merge(params, found), sparse.merge(params, kept))
    gradient = jax.grad(
        lambda delta: again.merge(params, {**found, "delta": delta})["layers"]["kernel"].sum()
    )
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(gradient(found["delta"])["layers"]["kernel"]))


def test_projections_that_make_no_sense_are_errors():
    tuned, variables = made(DiffPruning())
    with pytest.raises(InputError, match=r"fraction=0\.0 must be above 0"):
        project(tuned, variables, 0.0)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, variables)
    with pytest.raises(InputError, match=r"the difference at .* is not finite"):
        project(tuned, bad, 0.5)
    other, own = made(BitFit())
    with pytest.raises(InputError, match="no entry of this tuned model is diff pruning"):
        project(other, own, 0.5)


# --- SAID


def test_hadamard_is_sylvesters_matrix():
    matrix = np.ones((1, 1))
    for _ in range(3):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    np.testing.assert_array_equal(hadamard(jnp.eye(8)), matrix)


@pytest.mark.parametrize("width", [1, 2, 8, 256])
def test_permutations_are_permutations(width):
    found = np.asarray(permutations(jnp.uint32(3), jnp.arange(50, dtype=jnp.uint32), width))
    np.testing.assert_array_equal(np.sort(found, 1), np.broadcast_to(np.arange(width), found.shape))
    if width == 256:
        assert len({row.tobytes() for row in found}) == 50
        # Neighbours part: no row is close to the identity or to a shift of it.
        assert (np.diff(found, axis=1) == 1).mean() < 0.03


@pytest.mark.parametrize(("dimension", "size"), [(20, 4096), (64, 4000), (30, 7)])
def test_the_projection_is_linear_and_keeps_lengths(dimension, size):
    columns = jax.vmap(fastfood, (0, None, None))(jnp.eye(dimension), jnp.uint32(7), size)
    vector = jax.random.normal(jax.random.key(0), (dimension,))
    made_ = fastfood(vector, jnp.uint32(7), size)
    np.testing.assert_allclose(made_, vector @ columns, rtol=0, atol=1e-4)
    if size > dimension:
        np.testing.assert_allclose(jnp.linalg.norm(columns, axis=1), 1.0, atol=0.15)
        overlap = columns @ columns.T - jnp.eye(dimension)
        assert jnp.abs(overlap).max() < 0.3
    assert jnp.abs(made_ - fastfood(vector, jnp.uint32(8), size)).max() > 0.01


def test_the_projection_takes_little_memory():
    """Beside the result, less than twice its size, forwards and backwards; all at once it would be eleven."""

    def loss(vector, seed):
        return jnp.square(fastfood(vector, seed, 1_000_000)).sum()

    shapes = jax.ShapeDtypeStruct((500,), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32)
    memory = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1_000_000 * 3


def test_blocks_that_are_made_apart_are_those_made_together(monkeypatch):
    vector = jax.random.normal(jax.random.key(0), (60,))
    whole = fastfood(vector, jnp.uint32(5), 1000)
    monkeypatch.setattr("modicum.research.delta.intrinsic.AT_ONCE", 128)
    parts = fastfood.__wrapped__(vector, jnp.uint32(5), 1000)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_projection_is_the_same_for_ever():
    """A stored delta means the same numbers under any version of JAX: these are from the first."""
    made_ = fastfood(jnp.arange(1.0, 6.0), jnp.uint32(123), 10)
    wanted = [0.9565709, 0.886206, -2.736851, -0.4706368, 1.709377]
    wanted += [1.631277, 0.2103609, -1.844016, 1.125082, 3.951436]
    np.testing.assert_allclose(made_, wanted, rtol=1e-5)


def test_one_vector_moves_all_arrays():
    tuned, variables = made(SAID(10))
    assert parameter_count(variables["delta"]) == 10 + 4  # the vector, and a factor for each array
    assert variables["delta"]["~said"]["shared"]["vector"].shape == (10,)
    assert parameter_count(variables["delta_state"]) == 4
    assert sum(row.parameters for row in summary(tuned, PARAMS, variables) if row.status != "frozen") == 14
    vector = variables["delta"]["~said"]["shared"]["vector"].at[3].set(1.0)
    delta = {**variables["delta"], "~said": {"shared": {"vector": vector}}}
    merged = tuned.merge(PARAMS, {**variables, "delta": delta})
    for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS)):
        assert (new != old).any()
    gradient = jax.grad(lambda d: tuned.apply({**variables, "delta": d}, PARAMS, X).sum())(delta)
    assert jnp.abs(gradient["~said"]["shared"]["vector"]).min() > 0


def test_two_entries_of_said_have_two_vectors():
    tuned = attach_leaves(network, {"layers": SAID(4), "head": SAID(6)})
    delta = tuned.init(jax.random.key(0), PARAMS)["delta"]
    assert delta["~said"]["shared"]["vector"].shape == (4,)
    assert delta["~said_1"]["shared"]["vector"].shape == (6,)
    vector = jnp.ones(4)
    only = {**delta, "~said": {"shared": {"vector": vector}}}
    state = tuned.init(jax.random.key(0), PARAMS)["delta_state"]
    merged = tuned.merge(PARAMS, {"delta": only, "delta_state": state})
    np.testing.assert_array_equal(merged["head"]["kernel"], PARAMS["head"]["kernel"])
    assert (merged["layers"]["kernel"] != PARAMS["layers"]["kernel"]).all()


def test_said_comes_back_from_its_file(tmp_path):
    tuned, variables = made(SAID(10))
    variables = moved(variables)
    folder = save_delta(tmp_path, tuned, variables, PARAMS)
    again, found = load_delta(folder, FunctionModel(network), PARAMS)
    np.testing.assert_array_equal(again.apply(found, PARAMS, X), tuned.apply(variables, PARAMS, X))
