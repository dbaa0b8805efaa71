"""Planted experts are found exactly, and nothing is found where there is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from modicum import InputError
from modicum.models import (
    MLP,
    CentreSelection,
    GatedMLP,
    GroupedQuery,
    LowRankSelection,
    MLPSelection,
    OracleSelection,
    PostNorm,
    RMSNorm,
    Transformer,
    TransformerConfig,
    run_with_cache,
    stack_layers,
)
from modicum.research.sparsity.balanced import assign_balanced, balanced_kmeans
from modicum.research.sparsity.feed_forward import Layers, capture_inputs, regrouped
from modicum.research.sparsity.graph import cut, partition_graph, refine
from modicum.research.sparsity.moefication import Moefication, moefy
from modicum.research.sparsity.partitions import (
    Clusters,
    CoActivation,
    Contiguous,
    Shuffled,
    centres,
    coactivation,
)
from modicum.research.sparsity.quality import captured
from modicum.research.sparsity.routing import Fitting, fit_selection

from .planted import (
    NEURONS,
    SIZE,
    TOPICS,
    WIDTH,
    planted_inputs,
    planted_layer,
    same_groups,
    topics,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

CONSTRUCTIONS = (Clusters(), CoActivation("spectral"))
ROUTERS = (CentreSelection("distance"), CentreSelection(), MLPSelection(), LowRankSelection(TOPICS))
QUICK = Fitting(epochs=8, batch=100)


def kept_by(selection, dense, groups, inputs, chosen=1):
    experts = regrouped(dense, groups)
    router = fit_selection(selection, experts, centres(dense, groups), inputs[200:], QUICK)
    return captured(selection, router, experts, inputs[:200], chosen)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("partition", CONSTRUCTIONS, ids=lambda each: type(each).__name__)
def test_planted_experts_are_recovered_exactly(partition, gated):
    dense, labels = planted_layer(gated=gated)
    groups = partition.groups(dense, planted_inputs(), TOPICS, seed=0)
    assert same_groups(groups, labels)
    for other in (Contiguous(), Shuffled()):
        assert not same_groups(other.groups(dense, planted_inputs(), TOPICS, seed=0), labels)


@pytest.mark.parametrize("selection", ROUTERS, ids=lambda each: type(each).__name__ + str(each)[-10:-2])
def test_routers_find_the_planted_expert_and_random_groups_are_clearly_worse(selection):
    dense, _ = planted_layer()
    inputs = planted_inputs()
    good = kept_by(selection, dense, Clusters().groups(dense, inputs, TOPICS, 0), inputs)
    assert good.mass > 0.999 and good.best > 0.999 and good.recall > 0.999
    poor = kept_by(selection, dense, Shuffled().groups(dense, inputs, TOPICS, 0), inputs)
    assert poor.mass < 0.6 and poor.best < 0.7


@pytest.mark.parametrize("partition", CONSTRUCTIONS, ids=lambda each: type(each).__name__)
def test_nothing_is_found_in_a_shuffled_control(partition):
    dense, labels = planted_layer(shuffled=True)
    inputs = np.random.default_rng(3).normal(size=(2000, WIDTH)).astype(np.float32)
    groups = partition.groups(dense, inputs, TOPICS, 0)
    assert not same_groups(groups, labels)
    found = kept_by(OracleSelection(), dense, groups, inputs)
    chance = kept_by(OracleSelection(), dense, Shuffled().groups(dense, inputs, TOPICS, 0), inputs)
    assert chance.mass < 0.4 and found.mass < chance.mass + 0.15  # where experts were planted it is 1


def test_assignments_are_full_and_near_the_best():
    draw = np.random.default_rng(0)
    costs = draw.normal(size=(96, 8)).astype(np.float32)
    labels = assign_balanced(costs, 12)
    assert np.bincount(labels, minlength=8).tolist() == [12] * 8
    rows, columns = linear_sum_assignment(np.repeat(costs, 12, axis=1))
    best = np.repeat(costs, 12, axis=1)[rows, columns].sum()
    found = costs[np.arange(96), labels].sum()
    assert best - 1e-3 <= found <= best * 0.97  # costs are negative
    with pytest.raises(InputError, match="96 points do not fill 7 clusters"):
        assign_balanced(costs[:, :7], 12)
    with pytest.raises(InputError, match="do not divide into 7"):
        balanced_kmeans(costs, 7)


def test_refining_never_cuts_more():
    draw = np.random.default_rng(0)
    weights = draw.random((40, 40)).astype(np.float32)
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    start = np.repeat(np.arange(5), 8)
    better = refine(weights, start, 5)
    assert np.bincount(better).tolist() == [8] * 5
    assert cut(weights, better) < cut(weights, start)
    with pytest.raises(InputError, match="'other' is unknown"):
        partition_graph(weights, 5, method="other")


def test_metis_finds_the_planted_experts_too():
    pytest.importorskip("pymetis")
    dense, labels = planted_layer()
    assert same_groups(CoActivation("metis").groups(dense, planted_inputs(), TOPICS, 0), labels)


def test_coactivation_is_the_sum_of_products():
    dense, _ = planted_layer()
    inputs = planted_inputs(300)
    hidden = np.maximum(inputs @ np.asarray(dense.up)[:, 0].T + np.asarray(dense.up_bias)[:, 0], 0)
    np.testing.assert_allclose(coactivation(dense, inputs), hidden.T @ hidden, rtol=1e-4, atol=1e-3)


def planted_model(gated=False, **options):
    """A decoder whose tokens are topics and whose neurons are the planted ones; attention adds nothing."""
    given = {"layers": 2, "width": WIDTH, "vocab": TOPICS, "attention": GroupedQuery(2), "norm": RMSNorm()}
    mlp = GatedMLP(NEURONS, "relu", bias=True) if gated else MLP(NEURONS, "relu")
    model = Transformer(TransformerConfig(**{**given, "mlp": mlp, "tied": False, **options}))
    params = jax.tree.map(np.array, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    params["embedding"]["table"] = topics()
    params["position_embedding"]["table"] *= 0
    labels = []
    for index in range(2):
        dense, label = planted_layer(seed=index, gated=gated)
        layer = params[f"layers_{index}"]
        layer["attention"]["output"]["kernel"] *= 0
        names = {"up": dense.up, **({"gate": dense.gate} if gated else {})}
        for name, weights in names.items():
            layer["mlp"][name]["kernel"] = np.asarray(weights)[:, 0].T
            # a norm makes the topic's entry sqrt(D) times 1: the threshold lies above all others' noise
            layer["mlp"][name]["bias"] = np.full(
                NEURONS, -2.0 if name != "up" or not gated else 0.0, np.float32
            )
        layer["mlp"]["down"]["kernel"] = 0.002 * np.asarray(dense.down)[:, 0]
        labels.append(label)
    return model, params, labels


def token_batches(count=4):
    draw = np.random.default_rng(0)
    for _ in range(count):
        yield {"tokens": draw.integers(0, TOPICS, (4, 16)).astype(np.int32)}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_model_with_planted_experts_loses_nothing(gated):
    model, params, labels = planted_model(gated)
    tokens = next(token_batches())["tokens"]
    expected = model.apply(params, tokens)
    found = moefy(model, params, token_batches(), Moefication(1 / TOPICS, SIZE, fitting=QUICK))
    assert found.model.config.mlp.chosen == 1 and found.model.config.mlp.experts == TOPICS
    np.testing.assert_allclose(found.model.apply(found.params, tokens), expected, rtol=1e-4, atol=1e-4)
    assert [row["captured mass"] for row in found.rows()] == pytest.approx([1.0, 1.0])
    up = np.asarray(found.params["layers_1"]["mlp"]["experts"]["gate" if gated else "up"])
    name = "gate" if gated else "up"
    own = params["layers_1"]["mlp"][name]["kernel"].T
    groups = [[int(np.argmin(np.abs(own - row).sum(1))) for row in expert] for expert in up]
    assert same_groups(np.array(groups), labels[1])
    random = moefy(model, params, token_batches(), Moefication(1 / TOPICS, SIZE, Shuffled(), fitting=QUICK))
    assert all(row["captured mass"] < 0.6 for row in random.rows())
    assert np.abs(random.model.apply(random.params, tokens) - expected).max() > 1e-3


@pytest.mark.parametrize("residual", [None, PostNorm()], ids=["pre", "post"])
def test_captured_inputs_are_what_the_layers_read(residual):
    options = {} if residual is None else {"residual": residual}
    model, params, _ = planted_model(**options)
    batch = {**next(token_batches()), "segments": np.repeat([[1] * 10 + [0] * 6], 4, 0)}
    layers = Layers.of(model, params)
    found = capture_inputs(layers, [batch], tokens=1000)
    hook = "layers_1/mlp_norm" if residual is None else "layers_1/middle"
    _, seen = run_with_cache(model, params, batch["tokens"], segments=batch["segments"], names=[hook])
    expected = np.asarray(seen[hook])[batch["segments"] > 0]
    assert found["layers_1/mlp"].shape == (40, WIDTH)
    order = [np.lexsort(rows.T) for rows in (found["layers_1/mlp"], expected)]
    np.testing.assert_allclose(found["layers_1/mlp"][order[0]], expected[order[1]], rtol=1e-5, atol=1e-6)
    assert capture_inputs(layers, [batch, batch], tokens=7)["layers_0/mlp"].shape == (7, WIDTH)


def test_scanned_layers_are_converted_alike():
    model, params, _ = planted_model()
    scanned = Transformer(TransformerConfig(**{**vars(model.config), "scan": True}))
    wanted = Moefication(0.5, SIZE, selection=CentreSelection())
    one = moefy(model, params, token_batches(), wanted)
    two = moefy(scanned, stack_layers(params), token_batches(), wanted)
    assert one.model == two.model and one.kept == two.kept
    jax.tree.map(np.testing.assert_array_equal, dict(one.params), dict(two.params))


def test_what_cannot_be_converted_is_named():
    model, params, _ = planted_model()
    with pytest.raises(InputError, match=r"48 neurons do not divide into experts of 32; e\.g\. .*24, 48"):
        moefy(model, params, token_batches(), Moefication(neurons=32))
    alone = {"tokens": np.ones((1, 1), np.int32)}
    with pytest.raises(InputError, match="1 token to make experts from"):
        moefy(model, params, [alone], Moefication(0.5, SIZE))
    with pytest.raises(InputError, match=r"share=1\.5"):
        Moefication(1.5)
    once = moefy(model, params, token_batches(), Moefication(0.5, SIZE, selection=CentreSelection()))
    with pytest.raises(InputError, match="MoefiedMLP; an MLP or a GatedMLP"):
        moefy(once.model, once.params, token_batches(), Moefication(0.5, SIZE))
    with pytest.raises(InputError, match="do not have each of 48 neurons once"):
        regrouped(Layers.of(model, params).dense["layers_0/mlp"], np.zeros((6, 8), int))
