"""What is said of deltas' transfer, on results that are made up: what was put in is what comes out."""

import numpy as np
import pytest

from modicum.experiments.skill_neurons_deltas import (
    NONE,
    delta_relations,
    delta_similarities,
    deltas_table,
    updates,
    without_head,
)

NAMES, KINDS = ("one", "two", "three", "four"), ("a", "a", "b", "b")
KEYS = [(name, 0) for name in NAMES]


def stored(kind, numbers):
    """A LoRA of two sites whose product is the kind's own, but for a little."""
    found = {
        "predictivity": np.abs(numbers.normal(size=(1, 2, 30))),
        "states": numbers.normal(size=(2, 1, 30)),
    }
    for site in ("layers_0", "layers_1"):
        found[f"{site}/~lora/a"] = np.eye(6, 2) if kind == "a" else np.eye(6, 2)[::-1]
        found[f"{site}/~lora/b"] = np.ones((2, 5)) + 0.01 * numbers.normal(size=(2, 5))
    return found


@pytest.fixture
def found():
    """Deltas serve tasks of their kind, all equally well; prompts the tasks of the other kind."""
    numbers = np.random.default_rng(0)

    def served(name, well, others):
        here = {
            each: well if KINDS[NAMES.index(each)] == KINDS[NAMES.index(name)] else others for each in NAMES
        }
        return {**here, name: 0.8, NONE: 0.6}

    return {
        "lora": {key: {"accuracy": 0.9} for key in KEYS},
        "deltas": {key: served(key[0], 0.75, 0.5) for key in KEYS},
        "transfer": {key: served(key[0], 0.5, 0.75) for key in KEYS},
        "lora_arrays": {key: stored(kind, numbers) for key, kind in zip(KEYS, KINDS)},
    }


def test_a_loras_product_is_what_it_adds():
    numbers = np.random.default_rng(1)
    made = {f"{site}/a": numbers.normal(size=(4, 2)) for site in ("x", "y")}
    made |= {f"{site}/b": numbers.normal(size=(2, 3)) for site in ("x", "y")}
    np.testing.assert_allclose(updates({**made, "states": np.ones(3)})[1], made["y/a"] @ made["y/b"])
    variables = {"delta": {"layers_0": 1, "classifier": 2}, "delta_state": {}}
    assert without_head(variables) == {"delta": {"layers_0": 1}, "delta_state": {}}


def test_what_deltas_do_alike_is_found_and_what_they_do_not_is_not(found):
    maps = {
        "right": np.eye(4) + np.kron(np.eye(2), np.ones((2, 2))),
        "wrong": -np.kron(np.eye(2), np.ones((2, 2))),
    }
    rows = {row[0]: row[1:] for row in delta_relations(found, maps, NAMES, [0], KINDS).rows}
    assert len(rows) == 7
    assert rows["prompts: right"][3] == 1 and rows["prompts: wrong"][3] == -1
    assert rows["prompts: transfer"][3] == -1 and rows["LoRAs: updates, cosine"][3] > 0.5
    same, different, p = rows["LoRAs: updates, cosine"][:3]
    assert same > 0.9 and abs(different) < 0.1 and p == pytest.approx(1 / 3, abs=0.01)  # of three pairings
    assert abs(rows["LoRAs: Spearman of predictivity"][3]) < 0.9
    assert np.allclose(np.diag(delta_similarities(found, NAMES, [0])["LoRAs: activated, cosine"]), 1)


def test_the_table_has_every_source(found):
    table = deltas_table(found, NAMES, [0])
    assert table.columns == ("task", "tuned", *NAMES, NONE)
    row = [float(str(each)) for each in table.rows[2][1:]]
    assert row == [90, 50, 50, 80, 75, 60]
