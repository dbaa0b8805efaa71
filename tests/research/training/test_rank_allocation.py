"""AdaLoRA's budget against the same steps in NumPy, and against PEFT's allocator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum import InputError
from modicum.models.attention import GroupedQuery
from modicum.models.transformer import Transformer, TransformerConfig
from modicum.research.delta import AdaLoRA, attach
from modicum.research.training.objectives import delta_tuning, language_modelling, penalised
from modicum.research.training.rank_allocation import Budget, rank_allocation
from modicum.research.training.state import create_state
from modicum.research.training.step import make_train_step

RATE, STEPS, WARMUP, FINAL, EVERY, TARGET, RANK = 0.1, 20, 2, 5, 3, 2, 6
SETTINGS = {"target": TARGET, "steps": STEPS, "warmup": WARMUP, "final": FINAL, "every": EVERY}


def site(rng, lead=()):
    return {
        "a": rng.normal(size=(*lead, 7, RANK)),
        "e": np.zeros((*lead, RANK)),
        "b": rng.normal(size=(*lead, RANK, 5)),
    }


def delta():
    """One plain site, one of two scanned layers, and something that is not AdaLoRA's."""
    rng = np.random.default_rng(0)
    return {
        "head": {"~adalora_1": site(rng), "~full": {"value": rng.normal(size=3)}},
        "layers": {"query": {"~adalora": site(rng, (2,))}},
    }


def gradients():
    """Gradients of every step, larger at the head: it is to keep a higher rank."""
    rng = np.random.default_rng(1)
    made = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), delta()) for _ in range(STEPS)]
    return [{**each, "head": jax.tree.map(lambda leaf: 2 * leaf, each["head"])} for each in made]


def ours(wrapped=True):
    """The delta after every step."""
    params = jax.tree.map(jnp.asarray, delta())
    optimizer = optax.sgd(RATE)
    optimizer = rank_allocation(optimizer, **SETTINGS) if wrapped else optimizer
    state, update, after = optimizer.init(params), jax.jit(optimizer.update), []
    for slopes in gradients():
        updates, state = update(slopes, state, params)
        params = optax.apply_updates(params, updates)
        after.append(jax.tree.map(np.asarray, params))
    return after


def layers(tree):
    """Each matrix's triplets by name."""
    stack = tree["layers"]["query"]["~adalora"]
    rows = {f"row{row}": {name: leaf[row] for name, leaf in stack.items()} for row in range(2)}
    return {"head": tree["head"]["~adalora_1"], **rows}


def values(tree):
    """All `e`, site by site."""
    return np.stack([each["e"] for each in layers(tree).values()])


def by_hand():
    """The algorithm as PEFT and the authors' code have it, in NumPy and in their order."""
    weights = {name: {k: v.copy() for k, v in node.items()} for name, node in layers(delta()).items()}
    smooth = {name: {k: np.zeros_like(v) for k, v in node.items()} for name, node in weights.items()}
    spread = {name: {k: np.zeros_like(v) for k, v in node.items()} for name, node in weights.items()}
    after = []
    for step, slopes in enumerate(gradients(), start=1):
        for name, node in layers(slopes).items():
            for key, slope in node.items():
                weights[name][key] = weights[name][key] - RATE * slope
                if step < STEPS - FINAL:
                    now = abs(weights[name][key] * slope)
                    smooth[name][key] = 0.85 * smooth[name][key] + 0.15 * now
                    spread[name][key] = 0.85 * spread[name][key] + 0.15 * abs(now - smooth[name][key])
        total = RANK * 3
        if step <= WARMUP:
            kept, masks = total, False
        elif step > STEPS - FINAL:
            kept, masks = TARGET * 3, True
        else:
            left = 1 - (step - WARMUP) / (STEPS - FINAL - WARMUP)
            kept, masks = int((total - TARGET * 3) * left**3 + TARGET * 3), step % EVERY == 0
        if masks:
            score = {
                name: smooth[name]["e"] * spread[name]["e"]
                + (smooth[name]["a"] * spread[name]["a"]).mean(0)
                + (smooth[name]["b"] * spread[name]["b"]).mean(1)
                for name in weights
            }
            threshold = np.sort(np.concatenate(list(score.values())))[total - kept - 1]
            for name in weights:
                weights[name]["e"] = np.where(score[name] <= threshold, 0.0, weights[name]["e"])
        after.append(np.stack([node["e"] for node in weights.values()]))
    return after


def test_every_step_is_that_of_the_algorithm_by_hand(x64):
    for tree, wanted in zip(ours(), by_hand()):
        np.testing.assert_allclose(values(tree), wanted, rtol=1e-12, atol=1e-14)


def test_the_budget_is_reached_exactly_and_what_is_zero_stays_zero(x64):
    after = [values(tree) for tree in ours()]
    assert (after[WARMUP - 1] != 0).all()
    kept = [int((each != 0).sum()) for each in after]
    assert kept[-FINAL:] == [TARGET * 3] * FINAL
    for later in after[-FINAL:]:
        np.testing.assert_array_equal(later == 0, after[-FINAL] == 0)
    head, *rows = ((row != 0).sum() for row in after[-1])  # the budget is one for all sites
    assert head > max(rows)
    assert RANK * 3 > kept[5] > kept[8] > kept[11] >= TARGET * 3  # steps 6, 9 and 12 mask


def test_everything_but_the_singular_values_is_the_wrapped_optimizers(x64):
    allocated, plain = ours()[-1], ours(wrapped=False)[-1]
    for tree in (allocated, plain):
        for node in (tree["head"]["~adalora_1"], tree["layers"]["query"]["~adalora"]):
            node.pop("e")
    jax.tree.map(np.testing.assert_array_equal, allocated, plain)


def test_equal_scores_do_not_overshoot_the_budget():
    params = jax.tree.map(jnp.ones_like, delta())
    optimizer = rank_allocation(optax.sgd(0.1), target=2, steps=4)
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert int((values(params) != 0).sum()) == 6


def test_the_schedule():
    budget = Budget(target=2, steps=100, warmup=10, final=20, every=5)
    table = budget.table(start=36, sites=3)
    assert list(table[:11]) == [36] * 11 and list(table[81:]) == [6] * 20
    assert table[45] == 6 + 30 // 8  # half way
    assert (np.diff(table) <= 0).all()
    masking = [step for step in range(1, 101) if bool(budget.masks(jnp.asarray(step)))]
    assert masking == [*range(15, 81, 5), *range(81, 101)]


def test_the_state_is_checkpointed_with_the_optimizer_and_shares_no_memory():
    params = jax.tree.map(jnp.asarray, delta())
    state = create_state(params, rank_allocation(optax.adamw(1e-3), **SETTINGS))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    assert jax.tree.map(jnp.shape, state.optimizer.importance) == jax.tree.map(
        jnp.shape,
        {
            "head": {"~adalora_1": params["head"]["~adalora_1"]},
            "layers": params["layers"],
        },
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 7}, "target=7 is above the rank 6 of an AdaLoRA site"),
        ({"target": 0}, "target=0 must be at least 1"),
        ({"final": 0}, "final=0 must be at least 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"warmup": 15}, "warmup=15 and final=5 leave none of the 20 steps in between"),
        ({"smoothing": (0.85, 1.0)}, "must lie between 0 and 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_numbers_are_errors(change, message):
    with pytest.raises(InputError, match=message):
        rank_allocation(optax.sgd(0.1), **{**SETTINGS, **change}).init(delta())


def test_a_delta_without_adalora_is_an_error():
    with pytest.raises(InputError, match="nothing that is trained is AdaLoRA's"):
        rank_allocation(optax.sgd(0.1), **SETTINGS).init({"~lora": {"a": jnp.ones(2), "b": jnp.ones(2)}})


@pytest.mark.peers
def test_pefts_allocator_masks_the_same(x64):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    torch.set_num_threads(1)
    model, start = torch.nn.Module(), layers(delta())
    for name, node in start.items():
        holder = torch.nn.Module()
        model.add_module(name, holder)
        for key, part in (("lora_A", node["a"].T), ("lora_E", node["e"][:, None]), ("lora_B", node["b"].T)):
            parameter = torch.nn.Parameter(torch.from_numpy(np.array(part)))
            holder.add_module(key, torch.nn.ParameterDict({"default": parameter}))
    config = peft.AdaLoraConfig(
        target_r=TARGET, init_r=RANK, tinit=WARMUP, tfinal=FINAL, deltaT=EVERY, total_step=STEPS
    )
    allocator, optimizer = RankAllocator(model, config, "default"), torch.optim.SGD(model.parameters(), RATE)
    for step, (slopes, tree) in enumerate(zip(gradients(), ours()), start=1):
        for name, node in layers(slopes).items():
            holder = getattr(model, name)
            for key, part in (
                ("lora_A", node["a"].T),
                ("lora_E", node["e"][:, None]),
                ("lora_B", node["b"].T),
            ):
                getattr(holder, key)["default"].grad = torch.from_numpy(np.array(part))
        optimizer.step()
        allocator.update_and_allocate(model, step)
        theirs = [getattr(model, name).lora_E["default"].detach().numpy()[:, 0] for name in start]
        np.testing.assert_allclose(values(tree), np.stack(theirs), rtol=1e-12, atol=1e-14)


def test_a_training_run_ends_at_the_budget_and_resumes_in_between(quick_compile):
    """With the train step, the penalty, scanned layers and a state that went through memory and back."""
    model = Transformer(
        config=TransformerConfig(layers=2, width=8, vocab=20, attention=GroupedQuery(2, 1), scan=True)
    )
    rows = np.random.default_rng(0).integers(0, 20, (4, 7))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones((4, 6), np.float32)}
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])
    tuned = attach(model, {"attention/(query|output)": AdaLoRA(3)})
    variables = tuned.init(jax.random.key(1), params, batch["tokens"])
    frozen = {"params": params, "delta_state": variables["delta_state"]}
    optimizer = rank_allocation(optax.adamw(1e-2), target=1, steps=6, warmup=1, final=2)
    loss = penalised(language_modelling(delta_tuning(tuned)), tuned)
    step = jax.jit(make_train_step(loss, optimizer))
    state = create_state(variables["delta"], optimizer)
    states = []
    for _ in range(6):
        state, metrics = step(state, frozen, batch)
        states.append(jax.tree.map(np.asarray, state))
        assert metrics["finite"]
    sites = states[-1].trainable["layers"]["attention"]
    kept = [sites[name]["~adalora"]["e"] for name in ("query", "output")]
    assert sum(int((e != 0).sum()) for e in kept) == 2 * 2  # a rank for each of two sites in two layers
    resumed = states[2]
    for _ in range(3):
        resumed, _ = step(resumed, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, resumed), states[-1])
