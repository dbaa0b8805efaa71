"""Other methods' deltas as plain LoRA: the same outputs where a form is exact, the nearest where none is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import GroupedQuery, Transformer, TransformerConfig
from modicum.models.precision import Precision
from modicum.research.delta import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    DoRA,
    LoRA,
    VeRA,
    attach,
    entry_names,
    load_delta,
    save_delta,
    to_lora,
    without,
)

DOUBLE = Precision("float64", "float64", "float64")
WIDTH = 12
QUERY = "attention/(query|value)"


@pytest.fixture(scope="module", autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def bench(in_double_precision, quick_compile):
    """Attaches a specification to a decoder, moves it from its start, and gives outputs."""

    class Bench:
        tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 50)

        def __init__(self):
            attention = GroupedQuery(4)
            options = {"layers": 3, "width": WIDTH, "vocab": 50, "attention": attention, "precision": DOUBLE}
            self.models = {
                scan: Transformer(TransformerConfig(**options, scan=scan)) for scan in (True, False)
            }
            self.params = {
                scan: jax.jit(model.init)(jax.random.key(0), self.tokens)
                for scan, model in self.models.items()
            }

        def tuned(self, spec, scan=False):
            tuned, params = attach(self.models[scan], spec), jax.tree.map(jnp.asarray, self.params[scan])
            variables = tuned.init(jax.random.key(1), params, self.tokens)
            leaves, structure = jax.tree.flatten(variables["delta"])
            keys = jax.random.split(jax.random.key(3), len(leaves))
            moved = [
                leaf + 0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)
            ]
            return tuned, {**variables, "delta": jax.tree.unflatten(structure, moved)}, params

        def outputs(self, tuned, variables, params):
            return jax.jit(tuned.apply)(variables, params, self.tokens)

    return Bench()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_are_loras_of_twice_the_rank(bench, start, scan):
    method = LoRA(2, alpha=6.0, initialisation=start, rank_stabilised=True)
    tuned, variables, params = bench.tuned({f"layers_{{1-2}}/{QUERY}": method, "mlp/up": BitFit()}, scan)
    found = to_lora(tuned, variables, params)
    entry = found.tuned.entries[0]
    assert entry.method == LoRA(4, alpha=4.0) and entry.name == "~lora"
    assert found.variables["delta_state"] == {} and set(found.residual.values()) == {0.0}
    wanted = bench.outputs(tuned, variables, params)
    np.testing.assert_allclose(bench.outputs(*found[:2], params), wanted, rtol=0, atol=1e-12)
    assert np.abs(wanted - bench.outputs(tuned, {"delta": {}}, params)).max() > 1e-2


def test_plain_loras_and_leaf_deltas_stay(bench):
    tuned, variables, params = bench.tuned({QUERY: LoRA(2, dropout=0.1), "mlp": BitFit()})
    found = to_lora(tuned, variables, params, rank=1)
    assert found.tuned == tuned and found.residual == {}
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)


def test_adalora_is_exact_without_its_pruned_triplets(bench):
    tuned, variables, params = bench.tuned({QUERY: AdaLoRA(6, alpha=5.0)}, scan=True)
    for name, pruned in (("query", ([0, 3], [1])), ("value", ([1, 2, 4], [5, 0]))):
        own = variables["delta"]["layers"]["attention"][name]["~adalora"]
        for layer, triplets in enumerate(pruned):
            own["e"] = own["e"].at[layer, jnp.array(triplets)].set(0.0)
    wanted = bench.outputs(tuned, variables, params)
    whole = to_lora(tuned, variables, params)
    assert whole.tuned.entries[0].method == LoRA(6, alpha=6.0)  # the third layer has all of its own
    np.testing.assert_allclose(bench.outputs(*whole[:2], params), wanted, rtol=0, atol=1e-12)
    for name in ("query", "value"):
        own = variables["delta"]["layers"]["attention"][name]["~adalora"]
        own["e"] = own["e"].at[2, :2].set(0.0).at[:, 5].set(0.0)
    found = to_lora(tuned, variables, params)
    assert found.tuned.entries[0].method.rank == 4
    wanted = bench.outputs(tuned, variables, params)
    np.testing.assert_allclose(bench.outputs(*found[:2], params), wanted, rtol=0, atol=1e-12)


def test_vera_is_exact_at_its_rank_and_nearest_below(bench):
    tuned, variables, params = bench.tuned({QUERY: VeRA(20)})
    wanted = bench.outputs(tuned, variables, params)
    exact = to_lora(tuned, variables, params)
    assert exact.tuned.entries[0].method.rank == 20 and exact.variables["delta_state"] == {}
    np.testing.assert_allclose(bench.outputs(*exact[:2], params), wanted, rtol=0, atol=1e-12)
    full = to_lora(tuned, variables, params, rank=WIDTH)  # less than 20, and all that a matrix has
    np.testing.assert_allclose(bench.outputs(*full[:2], params), wanted, rtol=0, atol=1e-11)


def test_dora_is_exact_at_full_rank_and_says_what_is_missing_below(bench):
    tuned, variables, params = bench.tuned({QUERY: DoRA(2)}, scan=True)
    wanted = bench.outputs(tuned, variables, params)
    whole = to_lora(tuned, variables, params, rank=WIDTH)
    np.testing.assert_allclose(bench.outputs(*whole[:2], params), wanted, rtol=0, atol=1e-11)
    assert max(whole.residual.values()) < 1e-12

    low = to_lora(tuned, variables, params, rank=3)
    merged, again = tuned.merge(params, variables), low.tuned.merge(params, low.variables)
    for site, figure in low.residual.items():
        kernels = [
            tree["layers"]["attention"][site.split("/")[2]]["kernel"] for tree in (merged, again, params)
        ]
        update, error = kernels[0] - kernels[2], kernels[1] - kernels[0]
        np.testing.assert_allclose(figure, np.linalg.norm(error) / np.linalg.norm(update), rtol=1e-9)
        # No LoRA of this rank is nearer: what is left are the smaller singular values of the update.
        values = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(error), np.linalg.norm(values[:, 3:]), rtol=1e-9)
    assert set(low.residual) == {f"layers/attention/{name}/~dora" for name in ("query", "value")}
    assert min(low.residual.values()) > 0.01


def test_a_share_of_the_energy_chooses_the_rank(bench):
    tuned, variables, params = bench.tuned({QUERY: DoRA(2)})
    ranks = {}
    for share in (0.5, 0.9, 0.999):
        found = to_lora(tuned, variables, params, rank=share)
        ranks[share] = found.tuned.entries[0].method.rank
        assert max(found.residual.values()) ** 2 <= 1 - share + 1e-12
        if ranks[share] > 1:  # one less would miss more than allowed somewhere
            below = to_lora(tuned, variables, params, rank=ranks[share] - 1)
            assert max(below.residual.values()) ** 2 > 1 - share
    assert ranks[0.5] < ranks[0.9] < ranks[0.999] <= WIDTH


def test_a_pissa_can_be_cut_to_a_rank(bench):
    tuned, variables, params = bench.tuned({QUERY: LoRA(2, initialisation="pissa")})
    assert to_lora(tuned, variables, params, rank=4).residual.keys()
    cut = to_lora(tuned, variables, params, rank=3)
    assert cut.tuned.entries[0].method.rank == 3 and 0 < min(cut.residual.values()) < 0.5


def test_ia3_on_inputs_is_a_lora_of_full_rank(bench):
    tuned, variables, params = bench.tuned({"mlp/down": IA3(on="input")}, scan=True)
    found = to_lora(tuned, variables, params, rank=WIDTH)
    wanted = bench.outputs(tuned, variables, params)
    np.testing.assert_allclose(bench.outputs(*found[:2], params), wanted, rtol=0, atol=1e-11)


def test_stacked_entries_convert_one_after_another(bench):
    spec = {QUERY: [LoRA(2), LoRA(2, initialisation="pissa")], "mlp/up": DoRA(2)}
    tuned, variables, params = bench.tuned(spec)
    found = to_lora(tuned, variables, params, rank=WIDTH)
    assert [entry.name for entry in found.tuned.entries] == ["~lora", "~lora_1", "~lora_2"]
    wanted = bench.outputs(tuned, variables, params)
    np.testing.assert_allclose(bench.outputs(*found[:2], params), wanted, rtol=0, atol=1e-11)


def test_the_result_is_stored_like_any_delta(bench, tmp_path):
    tuned, variables, params = bench.tuned({QUERY: LoRA(2, initialisation="pissa")})
    found = to_lora(tuned, variables, params)
    save_delta(tmp_path, found.tuned, found.variables, params)
    again, loaded = load_delta(tmp_path, bench.models[False], params)
    assert again == found.tuned
    jax.tree.map(np.testing.assert_array_equal, loaded["delta"], found.variables["delta"])


def test_what_has_no_lora_says_so(bench):
    tuned, variables, params = bench.tuned({"mlp/down": Adapter(2)})
    with pytest.raises(InputError, match="layers_0/mlp/down: Adapter cannot be merged"):
        to_lora(tuned, variables, params, rank=4)
    tuned, variables, params = bench.tuned({"attention/key": IA3()})
    params["layers_0"]["attention"]["key"]["bias"] = jnp.ones(WIDTH)
    with pytest.raises(InputError, match="layers_0/attention/key: IA3 changes 'bias' too"):
        to_lora(tuned, variables, params, rank=4)


def test_ranks_that_cannot_be(bench):
    tuned, variables, params = bench.tuned({QUERY: DoRA(2)})
    with pytest.raises(InputError, match="delta '~dora': DoRA's update is not of low rank; give rank="):
        to_lora(tuned, variables, params)
    with pytest.raises(
        InputError, match="delta '~dora': rank=13 exceeds its smallest matrix; at most 12 fits"
    ):
        to_lora(tuned, variables, params, rank=13)
    for rank in (0, -1, 1.0, 0.0, 1.5, True):
        with pytest.raises(InputError, match=r"is neither a number from 1 nor a share"):
            to_lora(tuned, variables, params, rank=rank)


def test_entries_that_are_switched_off_stay_so(bench):
    tuned, variables, params = bench.tuned({QUERY: DoRA(2), "mlp/up": VeRA(2), "mlp/down": AdaLoRA(2)})
    found = to_lora(tuned, without(variables, ["dora", "vera"]), params)
    assert set(found.residual) == {f"layers_{layer}/mlp/down/~adalora" for layer in range(3)}
    assert entry_names(found.variables) == {"~lora"}
