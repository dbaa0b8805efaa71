"""Neurons of 27 emotions in MiniLM's published weights, by prompt tuning.

Claims put to the test: neurons for concepts of emotions emerge in a language model, tasks of like emotions
have like neurons, and masking the neurons of an attribute of emotions costs the emotions that have it more
than masking as many random ones (Li et al., arXiv 2302.09582, with RoBERTa-base and ratings of people).

Command: `modicum study emotion-neurons` (an hour of one core; stopped at any point, it goes on),
`--size quick` for fewer, `--size smoke` for a minute. Expected: docs/results/emotion_neurons.md.

Each emotion of GoEmotions (Demszky et al., 2020) is a task of its own: is this text of it, or of another
emotion? Both answers are equally frequent in all splits. All tasks share one compiled program, of which a
task's prompt, rate, seed and texts are arguments. People's ratings are not public; the attributes are the
groups that come with the data: Ekman's six, and valence, which follows from them (joy is pleasant, surprise
neither, the other four are not).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from ..models import Transformer
from ..research.data.batches import Batches, evaluation_batches
from ..research.neurons import (
    Spread,
    TokenMean,
    activations,
    fixed,
    over_trials,
    random_like,
    select,
    stacked,
)
from ..research.neurons.attributes import attribute_scores, membership
from ..research.study.study import run_cell
from ..research.training.trials import HEAD
from .delta_methods import Backbone
from .emotion_tasks import Emotions
from .skill_neurons_cells import balanced_accuracy, top_neurons
from .skill_neurons_work import ARRAYS, Programs, Work, read_at_once

REVISION = 2
ATTRIBUTES = ("valence", "anger", "sadness", "surprise")
RANKINGS = ("prompts", "texts")


@dataclass(frozen=True)
class Size:
    """How much of everything: rows are texts of one emotion's task at most, `emotions` () are all 27.

    `shares` of every layer's neurons are masked, and as many random ones `draws` times.
    """

    steps: int = 60
    batch: int = 16
    prompt: int = 8
    length: int = 24
    rate: float = 0.03
    read_rows: int = 192
    dev_rows: int = 128
    test_rows: int = 96
    seeds: tuple[int, ...] = (0, 1)
    shares: tuple[float, ...] = (0.15,)
    draws: int = 16
    emotions: tuple[str, ...] = ()


SIZES: Mapping[str, Size] = {
    "full": Size(),
    "quick": Size(steps=40, read_rows=96, dev_rows=96, test_rows=64, seeds=(0,), draws=8),
    "smoke": Size(
        steps=2,
        batch=4,
        prompt=4,
        length=16,
        read_rows=16,
        dev_rows=16,
        test_rows=16,
        seeds=(0,),
        shares=(0.2,),
        draws=2,
        emotions=("anger", "annoyance", "joy", "love", "sadness", "surprise"),
    ),
}


TUNING = ("steps", "batch", "prompt", "length", "rate", "read_rows", "dev_rows", "test_rows")
READS: Mapping[str, tuple[str, ...]] = {  # of the size, by what is asked
    "concepts": ("length", "read_rows", "emotions"),
    "trial": TUNING,
    "masked": (*TUNING, "emotions", "shares", "draws"),
}


@dataclass(frozen=True)
class Cell:
    """What a run asks of an emotion's task (of all of them: ""), and the part of the size that it reads."""

    what: str
    emotion: str
    size: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """The study's folder, data, backbone and size; cells that are finished there are not run again."""

    folder: Path
    data: Path
    size: Size
    backbone: Backbone

    def run(self) -> dict[str, Any]:
        """Every cell: results by what was asked, emotion and seed, and the arrays of the trials."""
        found: dict[str, Any] = {"trial": {}, "arrays": {}, "masked": {}}
        found["concepts"] = load_file(self._cell("concepts", "", 0, self._concepts)[1] / ARRAYS)["concepts"]
        for seed in self.size.seeds:
            for name in self.names:
                result, folder = self._cell("trial", name, seed, self._trial)
                found["trial"][name, seed] = result
                found["arrays"][name, seed] = load_file(folder / ARRAYS)
            for name in self.names:
                found["masked"][name, seed] = self._cell("masked", name, seed, self._masked)[0]
        return found

    @cached_property
    def emotions(self) -> Emotions:
        """The texts and the emotions' groups."""
        return Emotions.load(self.data / "goemotions", self.backbone.tokenizer, self.size.length)

    @property
    def names(self) -> tuple[str, ...]:
        """The emotions whose tasks are studied, those of one group beside each other."""
        return self.emotions.ordered(self.size.emotions)

    @property
    def groups(self) -> np.ndarray:
        """The Ekman group of each of `names`."""
        return np.asarray([self.emotions.groups[name] for name in self.names])

    @property
    def valences(self) -> np.ndarray:
        """Whether each of `names` is pleasant (Ekman's joy), unclear (surprise) or unpleasant."""
        known = {"joy": "pleasant", "surprise": "unclear"}
        return np.asarray([known.get(group, "unpleasant") for group in self.groups])

    @cached_property
    def programs(self) -> Programs:
        """The one set of compiled functions of all tasks."""
        size = self.size
        example = Batches(self.emotions.task(self.names[0], size).train, size.batch)[0]
        return Programs(self.backbone, 2, example, size.steps, size.prompt)

    def work(self, name: str) -> Work:
        """An emotion's texts with the shared programs; states are of texts that are the same for all."""
        rows = self.emotions.task(name, self.size)
        read = self.emotions.balanced("train", name, self.size.read_rows)
        return Work(rows, self.programs, read, self._common, read_at_once(self.size))

    @cached_property
    def _common(self) -> Mapping[str, np.ndarray]:
        count = read_at_once(self.size)
        return next(iter(evaluation_batches(self.emotions.spread("dev", count), count)))

    def arrays(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """What the trial of an emotion and seed stored."""
        return load_file(self._cell("trial", name, seed, self._trial)[1] / ARRAYS)

    def _cell(
        self, what: str, name: str, seed: int, ask: Callable[..., dict[str, Any]]
    ) -> tuple[dict[str, Any], Path]:
        reads = {field: getattr(self.size, field) for field in READS[what]}
        run = run_cell(
            self.folder,
            Cell(what, name, reads),
            f"{what}-{name or 'all'}-seed{seed}",
            partial(ask, name, seed),
            seed=seed,
            data_fingerprint=self.emotions.fingerprint,
            revision=REVISION,
        )
        return run.result, run.folder

    def _trial(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Tune an emotion's prompt; read its neurons, and those of the same prompt before training."""
        work, size = self.work(name), self.size
        trials = work.programs.trials
        batches = Batches(work.rows.train, size.batch, seed)
        trial = trials.advance(trials.start(seed, size.rate), batches, size.steps)
        variables = work.variables_of(trial)
        thresholds, dev, test = work.read(variables)
        dev_before, test_before = work.untrained
        shuffled = work.shuffled(variables, thresholds, seed)
        stored = {
            **flatten_dict(variables["delta"], sep="/"),
            "predictivity": dev.by_neuron().astype(np.float32),
            "untrained": dev_before.by_neuron().astype(np.float32),
            "states": work.states(variables),
        }
        save_file({key: np.ascontiguousarray(value) for key, value in stored.items()}, folder / ARRAYS)
        truth = work.truth(work.rows.test)
        chosen = trials.score(trial, work.rows.test, work.batch).chosen
        return {
            "texts": self.emotions.count("train", name),
            "test_texts": len(truth),
            "accuracy": balanced_accuracy(chosen, truth),
            **top_neurons("top", dev, test),
            **top_neurons("untrained_top", dev_before, test_before),
            **top_neurons("shuffled_top", shuffled, test),
        }

    def _concepts(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Mean activations `[N, L, F]` of each emotion's training texts, without any prompt."""
        model = Transformer(self.backbone.model.config, None)
        params = {key: tree for key, tree in self.backbone.params.items() if key != HEAD}
        spread = Spread(lambda arrays, batch: activations(model, arrays, batch, read=TokenMean()))
        means = []
        for each in self.names:
            rows = self.emotions.of("train", each, self.size.read_rows // 2)
            means.append(spread(params, evaluation_batches(rows, read_at_once(self.size)))[0][:, 0])
        save_file({"concepts": np.stack(means)}, folder / ARRAYS)
        return {"emotions": list(self.names)}

    def _masked(self, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Which test texts are right where neurons of an attribute, or random ones, are held at 0."""
        work, stored = self.work(name), self.arrays(name, seed)
        masks = self.masks(seed)
        changes = stacked([fixed(mask) for mask in masks.values()])
        correct = work.programs.perturbed(
            work.arrays(work.variables(stored)), work.batches(work.rows.test), changes, seed
        )
        right = {label: np.flatnonzero(row).tolist() for label, row in zip(masks, correct)}
        return {"correct": right, "rows": correct.shape[1]}

    def ratings(self, attribute: str) -> np.ndarray:
        """An attribute's value `[N]` for each emotion; nan where it has none."""
        if attribute != "valence":
            return membership(self.groups, attribute)
        return np.where(self.valences == "unclear", np.nan, membership(self.valences, "pleasant"))

    def masks(self, seed: int) -> dict[str, np.ndarray]:
        """Neurons `[L, F]` by `ranking/attribute/share`, `random/draw/share`, and none of them: `whole`."""
        if seed not in self._masks:
            self._masks[seed] = self._rank(seed)
        return self._masks[seed]

    @cached_property
    def _masks(self) -> dict[int, dict[str, np.ndarray]]:
        return {}

    def _rank(self, seed: int) -> dict[str, np.ndarray]:
        states = np.stack([self.arrays(name, seed)["states"].mean(1) for name in self.names])
        concepts = load_file(self._cell("concepts", "", 0, self._concepts)[1] / ARRAYS)["concepts"]
        chosen = {"whole": np.zeros(states.shape[1:], bool)}
        for share in self.size.shares:
            for ranking, values in zip(RANKINGS, (states, concepts)):
                for attribute in ATTRIBUTES:
                    scores = attribute_scores(values, self.ratings(attribute))
                    chosen[f"{ranking}/{attribute}/{share}"] = select(scores[None], share)
            skilled = select(over_trials([self.arrays(n, seed)["predictivity"] for n in self.names]), share)
            chosen[f"predictivity/all/{share}"] = skilled
            for draw in range(self.size.draws):
                chosen[f"random/{draw}/{share}"] = random_like(skilled, 1000 * seed + draw)
        return chosen
