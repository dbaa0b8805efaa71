"""The tables and figures of the study of emotion neurons, and what they say of the claims."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..research.neurons import bootstrap, over_trials
from ..research.neurons.clusters import recovered, tree
from ..research.neurons.figures import dendrogram_figure, grouped_heat_maps, interval_bars
from ..research.neurons.perturbation import Interval
from ..research.neurons.relations import OVERLAPS, agreement, cosine, matrix, same_kind, spearman
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .emotion_neurons import ATTRIBUTES, RANKINGS, Study

Found = Mapping[str, Any]
TEXTS = "texts of the emotions"
FEW = 20  # test texts of an emotion's task below which its own figures say next to nothing


def write_report(study: Study, found: Found, page: Path | None) -> str:
    """Write tables and figures under the study's folder, and all of it into `page`; return the text."""
    figures = study.folder / "figures" if page is None else page.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    names, groups = study.names, study.groups.tolist()
    maps = similarities(found, names)
    masked = [effect for share in study.size.shares for effect in effects(study, found, share)]
    parts = []
    for title, table in (
        ("Emotions", emotion_table(found, names, groups)),
        ("Alike, by Ekman's groups", similarity_table(maps, groups)),
        ("Alike, by valence", similarity_table(maps, study.valences.tolist())),
        ("Tasks and texts", reference_table(maps)),
        ("Masked", mask_table(masked, len(study.size.seeds))),
    ):
        table.write(study.folder / "tables", re.sub(r"\W+", "-", title.lower()))
        parts.append(f"## {title}\n\n{table.caption}\n\n{table.markdown()}")
    shown = ("Spearman of predictivity", "activated: cosine, centred", TEXTS)
    grouped_heat_maps(figures / "similarity.png", {key: maps[key] for key in shown}, names, groups)
    for key, stem in zip(shown, ("predictivity", "activated", "texts")):
        dendrogram_figure(figures / f"tree_{stem}.png", key, tree(maps[key]), names, groups)
    mask_figure(masked, figures / "masked.png")
    images = [f"![{path.stem}]({figures.name}/{path.name})" for path in sorted(figures.glob("*.png"))]
    lines = verdicts(found, names, maps, groups, masked)
    text = "\n".join([*parts, "".join(f"* {line}\n" for line in lines), *(f"{line}\n" for line in images)])
    if page is not None:
        write_atomically(page, text)
    return text


def emotion_table(found: Found, names: Sequence[str], groups: Sequence[str]) -> Table:
    """A row an emotion: the tuned prompt, and the neuron that is best on dev, measured on test."""
    seeds = sorted({seed for _, seed in found["trial"]})
    keys = ("accuracy", "top_test", "untrained_top_test", "shuffled_top_test")
    rows: list[tuple[Cell, ...]] = []
    for name, group in zip(names, groups):
        runs = [found["trial"][name, seed] for seed in seeds]
        measured = (Measured.of([100 * run[key] for run in runs]) for key in keys)
        rows.append((name, group, runs[0]["texts"], runs[0]["test_texts"], *measured))
    columns = ("emotion", "group", "texts", "test texts", "prompt", "top neuron", "untrained", "shuffled")
    spread = f"mean ± s.d. of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    caption = (
        f"Test accuracy % of telling an emotion's texts from as many of the others, {spread}: the tuned "
        f"prompt; the neuron that was best on dev; the same with the prompt before training, which starts "
        f"alike for every seed and emotion (the vocabulary's first vectors); a neuron chosen by shuffled "
        f"labels. Texts: of the emotion in train. Chance is 50; with fewer than {FEW} test texts a row says "
        f"next to nothing."
    )
    return Table(columns, tuple(rows), caption)


def similarities(found: Found, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Matrices `[N, N]` by measure, in the mean over layers and seeds."""
    seeds = sorted({seed for _, seed in found["trial"]})
    arrays = found["arrays"]

    def joined(key: str) -> dict[str, np.ndarray]:
        return {name: over_trials([arrays[name, seed][key] for seed in seeds]).mean(0) for name in names}

    def mean_over_seeds(of: Any) -> np.ndarray:
        return np.mean([of(np.stack([arrays[name, seed]["states"] for name in names])) for seed in seeds], 0)

    maps = {
        "Spearman of predictivity": matrix(joined("predictivity"), spearman),
        "the same, untrained prompt": matrix(joined("untrained"), spearman),
        "activated: cosine, centred": mean_over_seeds(lambda states: _centred(states, names)),
    }
    for title, measure in OVERLAPS.items():
        maps[f"activated: {title}"] = mean_over_seeds(
            lambda states, measure=measure: matrix(dict(zip(names, states)), measure)
        )
    return maps | {TEXTS: _centred(found["concepts"], names)}


def _centred(states: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Cosines of activations `[N, L, ...]` less their mean over things: what tells these apart."""
    return matrix(dict(zip(names, states - states.mean(0))), cosine)


def similarity_table(maps: Mapping[str, np.ndarray], groups: Sequence[str]) -> Table:
    """A row a measure: similarity within and between groups, and the clusters that it makes."""
    rows: list[tuple[Cell, ...]] = []
    for title, similarity in maps.items():
        contrast, made = same_kind(similarity, groups), recovered(similarity, groups)
        rows.append(
            (title, round(contrast.same, 3), round(contrast.different, 3), f"{contrast.p:.4f}",
             round(made.rand, 2), f"{made.p:.4f}")
        )  # fmt: skip
    columns = ("similarity", "same group", "other group", "p", "Rand", "p of it")
    caption = (
        f"Mean similarity of emotions of one group and of two ({', '.join(dict.fromkeys(groups))}), p by "
        f"permuting emotions (one-sided, 10,000); adjusted Rand index of as many average-linkage clusters as "
        f"there are groups, p by 2,000 permutations. Centred: less the emotions' mean."
    )
    return Table(columns, tuple(rows), caption)


def reference_table(maps: Mapping[str, np.ndarray]) -> Table:
    """A row a measure: whether tasks are alike where the texts of their emotions are."""
    rows: list[tuple[Cell, ...]] = []
    for title, similarity in maps.items():
        if title != TEXTS:
            told = agreement(similarity, maps[TEXTS])
            interval = f"[{told.low:.2f}, {told.high:.2f}]"
            rows.append((title, round(told.correlation, 2), interval, f"{told.p:.4f}"))
    caption = (
        "Spearman correlation of two emotions' similarity as tasks with that of their texts (mean "
        "activations without a prompt, centred), with its 95% interval over resampled emotions and p by "
        "Mantel's test (one-sided, 10,000 permutations)."
    )
    return Table(("similarity", "with texts'", "95%", "p"), tuple(rows), caption)


@dataclass(frozen=True)
class Effect:
    """What masking one attribute's neurons costs, in % and points of test accuracy.

    `gap` is random less chosen for emotions that have the attribute, `others` for those that have it not,
    `contrast` their difference; `as_bad` of `draws` random masks of all seeds leave no more.
    """

    ranking: str
    attribute: str
    share: float
    whole: float
    chosen: float
    random: float
    gap: Interval
    others: Interval | None
    contrast: Interval | None
    as_bad: int
    draws: int


def effects(study: Study, found: Found, share: float) -> list[Effect]:
    """A row a ranking and attribute: accuracy lost by emotions that have it and by others, beside random."""
    names = np.asarray(study.names)
    result = []
    for ranking in RANKINGS:
        for attribute in ATTRIBUTES:
            ratings = study.ratings(attribute)
            have = ~np.isnan(ratings) if attribute == "valence" else ratings == 1
            label = f"{ranking}/{attribute}/{share}"
            own, others = names[have].tolist(), names[~have].tolist()
            result.append(_effect(found, label, own, others))
    return [*result, _effect(found, f"predictivity/all/{share}", names.tolist(), [])]


def _effect(found: Found, label: str, own: Sequence[str], others: Sequence[str]) -> Effect:
    chosen, random, whole = (100 * each for each in _right(found, label, own))
    gap, gap_there, contrast = random - chosen[:, None], None, None
    if others:
        there, random_there, _ = (100 * each for each in _right(found, label, others))
        gap_there = random_there - there[:, None]
        count, mine, theirs = gap.shape[-1] + gap_there.shape[-1], gap.shape[-1], gap_there.shape[-1]
        contrast = np.concatenate([gap * count / mine, -gap_there * count / theirs], -1)  # one set of masks
    ranking, attribute, share = label.split("/")
    as_bad = random.mean(-1) <= chosen.mean(-1, keepdims=True) + 1e-9
    return Effect(
        ranking, attribute, float(share),
        whole=whole.mean(), chosen=chosen.mean(), random=random.mean(),
        gap=bootstrap(gap),
        others=None if gap_there is None else bootstrap(gap_there),
        contrast=None if contrast is None else bootstrap(contrast),
        as_bad=int(as_bad.sum()), draws=as_bad.size,
    )  # fmt: skip


def _right(found: Found, label: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether the test texts of `names` are right, of S seeds: masked, randomly masked, and not at all.

    Arrays `[S, N]`, `[S, R, N]` of R random masks, which every seed draws anew, and `[S, N]`.
    """
    share = label.rpartition("/")[2]
    labels = [each.split("/") for each in next(iter(found["masked"].values()))["correct"]]
    controls = ["/".join(each) for each in labels if each[0] == "random" and each[-1] == share]

    def right(what: str, seed: int) -> np.ndarray:
        results = [found["masked"][name, seed] for name in names]
        rows = [np.isin(np.arange(each["rows"]), each["correct"][what]) for each in results]
        return np.concatenate(rows).astype(float)

    seeds = sorted({seed for _, seed in found["masked"]})
    chosen, whole = (np.stack([right(what, seed) for seed in seeds]) for what in (label, "whole"))
    return chosen, np.stack([[right(each, seed) for each in controls] for seed in seeds]), whole


def mask_table(masked: Sequence[Effect], seeds: int) -> Table:
    """The effects, a row each, of so many seeds."""
    rows: list[tuple[Cell, ...]] = []
    for effect in masked:
        intervals = [str(each) if each else "" for each in (effect.gap, effect.others, effect.contrast)]
        rows.append(
            (effect.attribute, effect.ranking, f"{effect.share:.0%}", round(effect.whole, 1),
             round(effect.chosen, 1), round(effect.random, 1),
             f"{effect.as_bad} of {effect.draws}", *intervals)
        )  # fmt: skip
    columns = (
        "attribute", "ranked by", "masked", "whole", "its neurons", "random", "random as bad", "gap",
        "gap of the others", "difference",
    )  # fmt: skip
    caption = (
        "Test accuracy % of the emotions that have an attribute, with the share of every layer's neurons "
        "that are most about it held at 0, and with as many random ones (mean of the draws; 'as bad': draws "
        "that leave no more than its seed's own neurons). Ranked by the neurons' states under the emotions' "
        "prompts, or by their means over the emotions' texts; 'predictivity' are all emotions' skill "
        "neurons. Gap: random less its neurons, in points; the same for emotions without the attribute; "
        "their difference. 95% intervals over test texts and over which random neurons were drawn"
        + (", not over seeds" if seeds == 1 else f" and over the {seeds} seeds")
        + " (all resampled together 2,000 times; the emotions stay the same)."
        + (f" Of {seeds} seeds intervals are too narrow where seeds differ." if 1 < seeds < 5 else "")
    )
    return Table(columns, tuple(rows), caption)


def mask_figure(masked: Sequence[Effect], path: Path) -> None:
    """Gaps to random masks with their intervals: emotions that have the attribute beside the others."""
    shown = [effect for effect in masked if effect.others]
    rows = [f"{effect.attribute}, by {effect.ranking}, {effect.share:.0%}" for effect in shown]
    bars = {
        "emotions that have it": [effect.gap for effect in shown],
        "the others": [effect.others for effect in shown if effect.others],
    }
    title = "What masking an attribute's neurons costs beyond random masks"
    interval_bars(path, title, rows, bars, "points of test accuracy, with 95% intervals")


def verdicts(
    found: Found,
    names: Sequence[str],
    maps: Mapping[str, np.ndarray],
    groups: Sequence[str],
    masked: Sequence[Effect],
) -> list[str]:
    """What the tables say, in sentences."""
    enough = {name for (name, _), run in found["trial"].items() if run["test_texts"] >= FEW}
    runs = [run for (name, _), run in found["trial"].items() if name in enough]
    said = []
    if runs:
        keys = ("accuracy", "top_test", "untrained_top_test", "shuffled_top_test")
        tuned, top, before, low = (100 * fmean(run[key] for run in runs) for key in keys)
        said.append(
            f"In the mean over the {len(enough)} of {len(names)} emotions with at least {FEW} test texts the "
            f"tuned prompt is right on {tuned:.1f}%, the best neuron on {top:.1f}%, before training on "
            f"{before:.1f}%, one chosen by shuffled labels on {low:.1f}%."
        )
    contrast = same_kind(maps["Spearman of predictivity"], groups)
    told = [effect.contrast for effect in masked if effect.contrast]
    return [
        *said,
        f"Predictivities correlate by {contrast.same:.3f} within Ekman's groups and {contrast.different:.3f} "
        f"between them (p = {contrast.p:.4f}).",
        f"Masking an attribute's neurons costs the emotions that have it more than the others, beyond random "
        f"masks, in {sum(each.low > 0 for each in told)} of {len(told)} cases (interval above 0), less in "
        f"{sum(each.high < 0 for each in told)}.",
    ]
