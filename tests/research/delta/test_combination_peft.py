"""Combinations beside PEFT's `add_weighted_adapter`, on the same adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.research.delta import LoRA, attach, combine

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SITES = {"first": (10, 14), "second": (14, 6)}
ALPHAS, RANK = (4.0, 12.0, 7.0), 4
WEIGHTS = [0.7, -0.4, 1.3]


class Ours(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="second")(nn.Dense(14, name="first")(x))


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (size_in, size_out) in SITES.items():
            setattr(self, name, torch.nn.Linear(size_in, size_out))

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def both():
    """The same three adapters as PEFT's and as ours."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    configs = [peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(SITES)) for alpha in ALPHAS]
    model = peft.get_peft_model(Theirs(), configs[0], adapter_name="task0")
    for index, config in enumerate(configs[1:], 1):
        model.add_adapter(f"task{index}", config)
    deltas = []
    for index, alpha in enumerate(ALPHAS):
        variables = {"delta": {}, "delta_state": {}}
        for name, (size_in, size_out) in SITES.items():
            a = rng.normal(size=(size_in, RANK)).astype(np.float32)
            b = rng.normal(size=(RANK, size_out)).astype(np.float32)
            variables["delta"][name] = {"~lora": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
            target = getattr(model.base_model.model, name)
            target.lora_A[f"task{index}"].weight.data = torch.from_numpy(a.T.copy())
            target.lora_B[f"task{index}"].weight.data = torch.from_numpy(b.T.copy())
        deltas.append((attach(Ours(), {"(first|second)": LoRA(RANK, alpha=alpha)}), variables))
    return model, deltas


def theirs(model, how, **options):
    """PEFT's combined adapter: by site A and B as ours are, and its scale."""
    tasks = [f"task{index}" for index in range(len(ALPHAS))]
    model.add_weighted_adapter(tasks, WEIGHTS, "combined", combination_type=how, **options)
    found = {}
    for name in SITES:
        target = getattr(model.base_model.model, name)
        pair = [part["combined"].weight.detach().numpy().T for part in (target.lora_A, target.lora_B)]
        found[name] = (*pair, target.scaling["combined"])
    model.delete_adapter("combined")
    return found


CASES = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd to rank 2": {"svd_rank": 2},
    "ties": {"density": 0.4},
    "ties by count": {"density": 0.4, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.3},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The density")
def test_every_way_agrees(both, case):
    model, deltas = both
    how, given = case.split()[0], CASES[case]
    options = {key: given[key] for key in ("density",) if key in given}
    if "svd_rank" in given:
        options["rank"] = given["svd_rank"]
    if how.startswith("dare"):
        options["rng"] = jax.random.key(0)
    tuned, variables = combine(
        deltas, WEIGHTS, how, frequency=given.get("majority_sign_method") == "frequency", **options
    )
    for name, (a, b, scale) in theirs(model, how, **given).items():
        own = variables["delta"][name]["~lora"]
        assert own["a"].shape == a.shape and own["b"].shape == b.shape
        assert tuned.entries[0].method.scale == scale == 1.0
        size = np.abs(a @ b).max()
        np.testing.assert_allclose(own["a"] @ own["b"], a @ b, rtol=0, atol=2e-6 * size)
        if "svd" not in how:  # a decomposition leaves signs and how values are shared open
            np.testing.assert_allclose(own["a"], a, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(own["b"], b, rtol=1e-5, atol=1e-6)
