"""Several deltas as one: sums, votes and prunings of LoRAs, joined deltas, stacks of methods on a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import GroupedQuery, Transformer, TransformerConfig
from modicum.models.precision import Precision
from modicum.research.delta import IA3, Adapter, BitFit, LoRA, attach, combine, join

DOUBLE = Precision("float64", "float64", "float64")
QUERY = "attention/(query|value)"


@pytest.fixture(scope="module", autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


def noisy(variables, seed, scale=0.2):
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return {**variables, "delta": jax.tree.unflatten(structure, moved)}


@pytest.fixture(scope="module")
def bench(in_double_precision, quick_compile):
    class Bench:
        tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 50)

        def __init__(self, scan=True):
            attention = GroupedQuery(4)
            options = {"layers": 2, "width": 12, "vocab": 50, "attention": attention, "precision": DOUBLE}
            self.model = Transformer(TransformerConfig(**options, scan=scan))
            self.params = jax.jit(self.model.init)(jax.random.key(0), self.tokens)

        def delta(self, spec, seed=0, **options):
            tuned = attach(self.model, spec, **options)
            return tuned, noisy(tuned.init(jax.random.key(1), self.params, self.tokens), seed)

        def outputs(self, tuned, variables):
            return jax.jit(tuned.apply)(variables, self.params, self.tokens)

        def update(self, tuned, variables):
            """What a delta adds to the kernels of query and value."""
            merged = tuned.merge(self.params, variables)
            trees = [tree["layers"]["attention"] for tree in (merged, self.params)]
            return {name: trees[0][name]["kernel"] - trees[1][name]["kernel"] for name in ("query", "value")}

    return Bench()


@pytest.fixture(scope="module")
def loras(bench):
    """Three LoRAs of one rank and different scales."""
    return [bench.delta({QUERY: LoRA(3, alpha=alpha)}, seed) for seed, alpha in enumerate((3.0, 6.0, 4.5))]


WEIGHTS = (0.7, -0.4, 1.2)


def weighted_sum(bench, deltas, weights):
    updates = [bench.update(*delta) for delta in deltas]
    return {name: sum(w * u[name] for w, u in zip(weights, updates)) for name in updates[0]}


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_cat_and_svd_are_the_sum_of_the_products(bench, loras, how):
    """Also with negative weights and unlike ranks."""
    deltas = [*loras[:2], bench.delta({QUERY: LoRA(2)}, 7)]
    tuned, variables = combine(deltas, WEIGHTS, how, **({} if how == "cat" else {"rank": 8}))
    assert tuned.entries[0].method == LoRA(8, alpha=8.0)
    wanted = weighted_sum(bench, deltas, WEIGHTS)
    found = bench.update(tuned, variables)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-12)


def test_svd_below_the_sum_of_ranks_is_the_nearest(bench, loras):
    tuned, variables = combine(loras, WEIGHTS, "svd")
    assert tuned.entries[0].method.rank == 3  # the largest that came in
    wanted, found = weighted_sum(bench, loras, WEIGHTS), bench.update(tuned, variables)
    for name in wanted:
        error = np.linalg.norm(np.asarray(found[name] - wanted[name]), axis=(1, 2))
        left = np.linalg.svd(np.asarray(wanted[name]), compute_uv=False)[:, 3:]
        np.testing.assert_allclose(error, np.linalg.norm(left, axis=1), rtol=1e-9)
        assert (error > 0.01).all()


def test_one_delta_of_any_sign_comes_back(bench, loras):
    """What a combination of one must be, its weight included, for every way that keeps all numbers."""
    wanted = bench.update(*loras[1])
    options = {"density": 1.0, "rng": jax.random.key(0)}
    for how in (
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_ties_svd",
        "magnitude_prune",
    ):
        prunes = how.startswith(("ties", "dare", "magnitude"))
        for weight in (0.5, -2.0):
            found = bench.update(*combine(loras[1:2], [weight], how, **(options if prunes else {})))
            for name in wanted:
                np.testing.assert_allclose(found[name], weight * wanted[name], rtol=0, atol=1e-11)


def test_ties_by_hand():
    """The example of a vote: pruned, signs elected by sum or by count, the mean of those that agree."""
    from modicum.research.delta.combination import Rule

    arrays = [
        jnp.array([5.0, 1.0, -3.0, 0.5]),
        jnp.array([-2.0, 4.0, -1.0, 0.1]),
        jnp.array([-2.0, 3.0, 2.0, 9.0]),
    ]
    kept = jnp.array([[5.0, 0, -3.0, 0], [-2.0, 4.0, 0, 0], [0, 3.0, 0, 9.0]])
    rule, key = Rule("ties", density=0.5), jax.random.key(0)
    np.testing.assert_array_equal(
        jnp.stack([Rule("magnitude_prune", 0.5)([a], np.ones(1), key) for a in arrays]), kept
    )
    np.testing.assert_allclose(rule(arrays, np.ones(3), key), [5.0, 3.5, -3.0, 9.0])
    np.testing.assert_allclose(rule(arrays, np.array([2.0, -1.0, 1.0]), key), [10.0, -0.5, -6.0, 9.0])
    whole = [jnp.array([5.0]), jnp.array([-2.0]), jnp.array([-2.0])]
    np.testing.assert_allclose(Rule("ties")(whole, np.ones(3), key), [5.0])
    np.testing.assert_allclose(Rule("ties", frequency=True)(whole, np.ones(3), key), [-2.0])


def test_dare_keeps_the_mean_and_follows_its_key(bench, loras):
    from modicum.research.delta.combination import Rule

    x = [jnp.full(20_000, 3.0)]
    drawn = Rule("dare_linear", 0.25)(x, np.ones(1), jax.random.key(1))
    assert set(np.unique(drawn)) == {0.0, 12.0}
    assert abs(float(drawn.mean()) - 3.0) < 5 * 12 * (0.25 * 0.75 / 20_000) ** 0.5
    options = {"how": "dare_ties_svd", "density": 0.5}
    runs = [combine(loras, WEIGHTS, rng=jax.random.key(i), **options)[1] for i in (1, 1, 2)]
    updates = [
        bench.update(combine(loras, WEIGHTS, rng=jax.random.key(1), **options)[0], run) for run in runs
    ]
    np.testing.assert_array_equal(updates[0]["query"], updates[1]["query"])
    assert np.abs(updates[0]["query"] - updates[2]["query"]).max() > 1e-3


def test_stacked_layers_combine_as_unrolled_ones(bench):
    """Shares and votes are of one layer's array, not of the whole stack."""
    flat = type(bench)(scan=False)
    results = []
    for each in (bench, flat):
        deltas = []
        for _ in range(2):
            tuned, variables = each.delta({QUERY: LoRA(3)})
            deltas.append((tuned, jax.tree.map(lambda leaf: jnp.zeros_like(leaf), variables)))
        results.append(deltas)
    rng = np.random.default_rng(0)
    for stacked, unrolled in zip(*results):
        for name in ("query", "value"):
            own = stacked[1]["delta"]["layers"]["attention"][name]["~lora"]
            for key in own:
                own[key] = jnp.asarray(rng.normal(size=own[key].shape))
                for layer in range(2):
                    unrolled[1]["delta"][f"layers_{layer}"]["attention"][name]["~lora"][key] = own[key][layer]
    for how in ("ties", "magnitude_prune_svd"):
        (_, a), (_, b) = (combine(deltas, [1.0, 0.5], how, density=0.4) for deltas in results)
        for layer in range(2):
            one, two = a["delta"]["layers"]["attention"]["query"]["~lora"], None
            two = b["delta"][f"layers_{layer}"]["attention"]["query"]["~lora"]
            found = one["a"][layer] @ one["b"][layer]
            np.testing.assert_allclose(found, two["a"] @ two["b"], rtol=0, atol=1e-12)


def test_addresses_that_only_one_delta_has(bench, loras):
    wider = bench.delta({QUERY: LoRA(3), "mlp/up": LoRA(2)}, 5)
    tuned, variables = combine([loras[0], wider], [1.0, 2.0], "cat")
    assert [(e.name, e.address.text, e.method.rank) for e in tuned.entries] == [
        ("~lora", QUERY, 6),
        ("~lora_1", "mlp/up", 2),
    ]
    joined, both = join([loras[0], wider])
    own = both["delta"]["layers"]
    for name in ("query", "value"):
        own["attention"][name]["~lora_1"]["b"] *= 2
    own["mlp"]["up"]["~lora_2"]["b"] *= 2
    np.testing.assert_allclose(
        bench.outputs(tuned, variables), bench.outputs(joined, both), rtol=0, atol=1e-11
    )


def test_what_does_not_combine(bench, loras):
    def refuses(match, deltas, weights, *args, **options):
        with pytest.raises(InputError, match=match):
            combine(deltas, weights, *args, **options)

    other = bench.delta({"attention/query": LoRA(3)})
    refuses("another model", [loras[0], (attach(type(bench)(scan=False).model, LoRA(3)), {})], [1, 1])
    refuses("2 weights for 3 deltas", loras, [1, 1])
    refuses("how='mean' is no way to combine; there are cat, linear", loras, WEIGHTS, "mean")
    refuses(r"how='ties' keeps a share .* density=None must be in \(0, 1\]", loras, WEIGHTS, "ties")
    refuses(r"density=1.5 must be in", loras, WEIGHTS, "ties", density=1.5)
    refuses("how='svd' keeps all numbers; density=0.5", loras, WEIGHTS, "svd", density=0.5)
    refuses("how='dare_linear' draws at random; give rng", loras, WEIGHTS, "dare_linear", density=0.5)
    refuses("rank=13 of the combination must be 1-12", loras, WEIGHTS, "svd", rank=13)
    refuses("how='cat' decides the rank by itself", loras, WEIGHTS, "cat", rank=4)
    refuses(
        "adds factors, and their ranks are 3, 2", [loras[0], bench.delta({QUERY: LoRA(2)})], [1, 1], "linear"
    )
    refuses("attention/query: delta 1 has it by address 'attention/query'", [loras[0], other], [1, 1])
    refuses("combine takes plain LoRAs, this is Adapter", [bench.delta({"mlp/down": Adapter(2)})], [1])
    refuses("plain LoRAs, this is LoRA.*pissa", [bench.delta({QUERY: LoRA(2, initialisation="pissa")})], [1])
    refuses("no delta was given", [], [])


def test_joined_deltas_act_as_one_specification(bench):
    first = bench.delta({QUERY: LoRA(2), "mlp/down": Adapter(2)}, 1)
    second = bench.delta({"attention/query": [LoRA(3, initialisation="pissa")], "mlp/up": BitFit()}, 2)
    tuned, variables = join([first, second])
    assert [entry.name for entry in tuned.entries] == ["~lora", "~adapter", "~lora_1", "~bitfit"]
    whole = attach(
        bench.model,
        {
            QUERY: LoRA(2),
            "mlp/down": Adapter(2),
            "attention/query": LoRA(3, initialisation="pissa"),
            "mlp/up": BitFit(),
        },
    )
    assert tuned == whole
    expected = jax.eval_shape(whole.init, jax.random.key(0), bench.params, bench.tokens)
    assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, expected)
    wanted = bench.outputs(*join([(first[0], first[1])]))
    np.testing.assert_array_equal(wanted, bench.outputs(*first))
    assert np.abs(bench.outputs(tuned, variables) - wanted).max() > 1e-3


def test_deltas_with_other_exclusions_do_not_join(bench):
    deltas = [bench.delta({QUERY: LoRA(2)}, exclude=exclude) for exclude in ((), ("attention/value",))]
    with pytest.raises(InputError, match=r"delta 1 has exclude=\['attention/value'\], delta 0 \[\]"):
        join(deltas)


STACKS = {
    "lora lora": [LoRA(2), LoRA(3)],
    "lora ia3": [LoRA(2), IA3()],
    "ia3 lora": [IA3(), LoRA(2)],
    "pissa ia3 lora": [LoRA(2, initialisation="pissa"), IA3(), LoRA(2)],
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_stack_on_one_layer_merges_in_its_order(bench, stack):
    tuned, variables = bench.delta({"attention/key": stack}, 4)
    outputs = bench.outputs(tuned, variables)
    merged = jax.jit(bench.model.apply)(tuned.merge(bench.params, variables), bench.tokens)
    np.testing.assert_allclose(outputs, merged, rtol=0, atol=1e-11)
    back = tuned.unmerge(tuned.merge(bench.params, variables), variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), back, bench.params)


@pytest.mark.parametrize("other", [IA3(), Adapter(2)], ids=["ia3", "adapter"])
def test_the_order_of_a_stack_matters(bench, other):
    """The first in the list acts first: on what the second one sees."""
    address = "attention/key"
    one, variables = bench.delta({address: [LoRA(2), other]}, 4)
    two = attach(bench.model, {address: [other, LoRA(2)]})
    difference = bench.outputs(one, variables) - bench.outputs(two, variables)
    assert np.abs(difference).max() > 1e-4
