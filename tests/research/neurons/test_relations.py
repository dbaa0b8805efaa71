"""Similarities of tasks against their definitions; tests see what is there and nothing where it is not."""

import numpy as np
import pytest
from scipy import stats

from modicum import InputError
from modicum.research.neurons.figures import curves, heat_maps, label_histograms
from modicum.research.neurons.relations import (
    OVERLAPS,
    agreement,
    binary_cosine,
    cosine,
    jaccard,
    matrix,
    same_kind,
    spearman,
    top_overlap,
)
from modicum.research.neurons.transfer import fit_probe

NUMBERS = np.random.default_rng(0)


def test_measures_are_what_they_are_called():
    a, b = NUMBERS.normal(size=(2, 50))
    tied = np.round(a)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(tied, b) == pytest.approx(stats.spearmanr(tied, b).statistic)
    assert spearman(np.ones(9), NUMBERS.normal(size=9)) == 0
    assert cosine(a, b) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    one, two = np.asarray([1.0, 2, -1, 0, 3, -2]), np.asarray([1.0, -2, 5, 0, 1, -2])
    assert binary_cosine(one, two) == pytest.approx(2 / 3) and jaccard(one, two) == pytest.approx(2 / 4)
    assert top_overlap(a, a) == 1 and top_overlap(a, -a) == 0
    assert all(measure(a, a) == pytest.approx(1) for measure in OVERLAPS.values())
    assert jaccard(-np.ones(3), -np.ones(3)) == 0 and cosine(np.zeros(3), np.ones(3)) == 0


def tasks(kinds, strength, seed=0):
    """Arrays `[L, F]` that share a part with those of their kind."""
    numbers = np.random.default_rng(seed)
    shared = {kind: numbers.normal(size=(3, 200)) for kind in sorted(set(kinds))}
    return {f"t{i}": strength * shared[kind] + numbers.normal(size=(3, 200)) for i, kind in enumerate(kinds)}


KINDS = ("a", "a", "a", "b", "b", "c")


def test_kinds_that_are_there_are_seen_and_others_are_not():
    similar = matrix(tasks(KINDS, 1.0), spearman)
    assert similar.shape == (6, 6) and similar[0, 1] > 0.3 > 0.2 > abs(similar[0, 5])
    contrast = same_kind(similar, KINDS)
    assert contrast.same > 0.3 and abs(contrast.different) < 0.1
    assert contrast.p == pytest.approx(1 / 60)  # there are 60 ways to call six tasks a, a, a, b, b, c
    chance = [same_kind(matrix(tasks(KINDS, 0.0, seed), spearman), KINDS).p for seed in range(12)]
    assert min(chance) > 1 / 60 - 1e-9 and 0.2 < np.mean(chance) < 0.8
    eight = same_kind(matrix(tasks((*KINDS, "c", "d"), 1.0), spearman), (*KINDS, "c", "d"))
    assert 1e-4 <= eight.p < 0.02
    for kinds in (("a",) * 6, tuple("abcdef")):
        with pytest.raises(InputError, match="pairs of one kind and of two are needed"):
            same_kind(similar, kinds)


def test_layers_are_compared_one_by_one():
    arrays = tasks(("a", "a"), 1.0)
    first = matrix(arrays, spearman, layers=[0])
    assert first[0, 1] == pytest.approx(spearman(arrays["t0"][0], arrays["t1"][0]))
    whole = np.mean([matrix(arrays, spearman, [layer])[0, 1] for layer in range(3)])
    assert matrix(arrays, spearman)[0, 1] == pytest.approx(whole)


def test_tasks_are_compared_among_the_neurons_of_either():
    """Tasks that are alike in their own neurons only are seen to be so there."""
    arrays = {name: NUMBERS.normal(size=(2, 3, 40)) for name in "ab"}
    arrays["b"][:, :, :8] = arrays["a"][:, :, :8]
    masks = {"a": np.arange(40) < 4, "b": (np.arange(40) < 8) & (np.arange(40) > 3)}
    among = {name: np.stack([mask, mask]) for name, mask in masks.items()}
    whole, own = matrix(arrays, cosine), matrix(arrays, cosine, among=among)
    assert own[0, 1] == pytest.approx(1) and whole[0, 1] < 0.6
    expected = cosine(arrays["a"][0][:, :8], arrays["b"][0][:, :8])
    assert matrix(arrays, cosine, layers=[0], among=among)[0, 1] == pytest.approx(expected)


def test_similarity_that_says_who_serves_whom_is_told_from_one_that_does_not():
    similar = matrix(tasks(KINDS, 1.0), spearman)
    found = agreement(similar, similar + 0.01 * NUMBERS.normal(size=(6, 6)))
    assert found.correlation > 0.8 and found.p < 0.05
    assert 0.3 < found.low < found.correlation <= found.high <= 1
    chance = [agreement(similar, NUMBERS.normal(size=(6, 6))).p for _ in range(8)]
    assert 0.2 < np.mean(chance) < 0.8
    with pytest.raises(InputError, match="agreement over 2 tasks; three or more"):
        agreement(similar[:2, :2], similar[:2, :2])


def test_a_probe_finds_what_is_linear_and_nothing_else():
    features = NUMBERS.normal(size=(300, 12)) * 10 + 100
    labels = (features[:, 3:6] - 100).argmax(1)
    probe = fit_probe(features[:200], labels[:200], 3)
    assert probe.accuracy(features[200:], labels[200:]) > 0.85
    shuffled = fit_probe(features[:200], NUMBERS.permutation(labels[:200]), 3)
    assert shuffled.accuracy(features[200:], labels[200:]) < 0.65
    with pytest.raises(InputError, match="no row has label 3"):
        fit_probe(features, labels, 4)


def test_figures_are_written_and_refuse_what_is_empty(tmp_path):
    label_histograms(
        tmp_path / "a" / "one.png", "neuron", {"no": NUMBERS.normal(size=9), "yes": np.ones(4)}, 0.5
    )
    heat_maps(tmp_path / "two.png", {"x": np.eye(3), "y": np.ones((3, 3))}, "abc", "abc")
    curves(tmp_path / "three.png", "t", [1, 2], {"l": [[1, 2], [2, 3]]}, ("x", "y"), {"base": 2.0})
    for path in ("a/one.png", "two.png", "three.png"):
        assert (tmp_path / path).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="needs examples of every label"):
        label_histograms(tmp_path / "no.png", "", {"no": np.ones(0)}, 0.0)
    with pytest.raises(InputError, match="is \\(3, 3\\), names"):
        heat_maps(tmp_path / "no.png", {"x": np.eye(3)}, "ab", "abc")
