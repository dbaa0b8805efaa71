"""`modicum neurons MODEL --data DATA`: which single neurons tell the labels of a data set apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from ... import InputError

if TYPE_CHECKING:
    from ...research.neurons import Accuracy
    from ...research.neurons.reading import Read
    from ...research.study.tables import Table
    from .language_models import LanguageModel

SHOWN = 8  # neurons that are printed


class Subject(NamedTuple):
    """A model with parameters as it is read, its tokenizer, and how many places a prompt puts in front."""

    model: Any
    params: Any
    speaker: LanguageModel
    notes: Mapping[str, Any]
    prompt: int


@dataclass(frozen=True)
class Neurons:
    """Find skill neurons: single neurons above whose training mean a text has one label and not the other.

    Baselines are of the train split, neurons are ranked on dev, and what is printed beside is their accuracy
    on test, where both labels count alike; and for comparison that of the neuron which shuffled labels of dev
    choose. More than two labels are each asked for against the rest.
    """

    model: tyro.conf.Positional[str]
    """A model folder, a finished run, a published checkpoint's folder or hub name; a delta's backbone."""
    data: str
    """A folder with train, dev and test files, or a hub name."""
    delta: Path | None = None
    """A delta of `modicum tune`, such as a soft prompt: neurons are read with it in place."""
    read: Literal["auto", "prompt", "mean", "max"] = "auto"
    """Where neurons are read: at a soft prompt's places, or their mean or maximum over a text's tokens. Auto:
    at the prompt where the delta is one of an encoder, else the mean."""
    text_column: str = ""
    pair_column: str = ""
    label_column: str = ""
    """As in `modicum tune`; empty: as it was tuned, or text and label."""
    rows: int = 2000
    """Texts of each split at most, drawn with a fixed seed; 0: all."""
    length: int = 0
    """Longest text in tokens; 0: the longest there is, which must fit the model's positions."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    batch: int = 32
    """Texts that are read at once."""
    fraction: float = 0.02
    """The share of every layer's neurons that are listed as skill neurons in neurons.csv."""
    out: Path | None = None
    """Folder for neurons.csv, layers.csv, and of each question the histogram of its best neuron."""
    ignore: tuple[str, ...] = ()
    """Keys of a published config.json to pass over although nobody here knows them."""

    def run(self) -> int:
        """Read the neurons and print the best."""
        from ...research.neurons import Predictivity, activations, neuron_site, one_against_rest
        from .compilation import cache_compilations
        from .progress import say

        if self.rows < 0 or self.batch < 1:
            raise InputError(f"rows={self.rows} must be at least 0 and batch={self.batch} at least 1")
        cache_compilations()
        subject = self._subject()
        config = subject.speaker.model.config
        read, site = self._read(subject.prompt, config.kind), neuron_site(config)
        splits, names = self._splits(subject)

        def reader(params: Any, batch: Any) -> Any:
            return activations(subject.model, params, batch, read=read, name=site, prompt=subject.prompt)

        probe = Predictivity(reader, one_against_rest(len(names)))
        batches = {split: self._batches(rows) for split, rows in splits.items()}
        thresholds = probe.thresholds(subject.params, batches["train"])
        dev, test = (probe.accuracy(subject.params, batches[split], thresholds) for split in ("dev", "test"))
        shuffled = probe.accuracy(subject.params, self._shuffled(batches["dev"]), thresholds)
        say("\n".join(self._said(names, dev, test, shuffled)))
        if self.out is not None:
            self._write(self.out, names, dev, test)
            self._histograms(self.out, names, dev, thresholds, reader, subject.params, batches["test"])
            say(f"written to {self.out}")
        return 0

    def _subject(self) -> Subject:
        from dataclasses import replace

        from ...models import Transformer
        from ...research.delta import read_header
        from ...research.delta.input_prompt import InputPrompt
        from ...research.training.tuning import load_tuned
        from .language_models import find_delta, open_backbone, open_body

        if self.delta is None:
            speaker = open_body(self.model, self.ignore)
            body = Transformer(speaker.model.config, None)
            params = {
                name: tree for name, tree in speaker.params.items() if name not in ("head", "classifier")
            }
            return Subject(body, params, replace(speaker, model=body), {}, 0)
        folder = find_delta(self.delta)
        notes = read_header(folder).get("notes", {})
        if notes.get("kind", "classification") != "classification":
            raise InputError(f"{folder} answers with texts; skill neurons are of a task with labels")
        speaker = open_backbone(self.model, notes, self.ignore)
        loaded = load_tuned(folder, speaker.model, speaker.params)
        prompts = [entry.method for entry in loaded.tuned.entries if isinstance(entry.method, InputPrompt)]
        bound = loaded.tuned.bind(loaded.variables)
        return Subject(bound, loaded.params, speaker, notes, sum(each.length for each in prompts))

    def _read(self, prompt: int, kind: str) -> Read:
        from ...research.neurons import Positions, TokenMax, TokenMean

        sees = kind == "encoder"  # a decoder's prompt stands before the text and knows nothing of it
        chosen = ("prompt" if prompt and sees else "mean") if self.read == "auto" else self.read
        if chosen == "prompt" and not (prompt and sees):
            why = (
                f"a {kind}'s prompt sees nothing of the text"
                if prompt
                else "needs a --delta that is a prompt"
            )
            raise InputError(f"--read prompt: {why}; valid here: mean, max")
        return Positions(0, prompt) if chosen == "prompt" else TokenMean() if chosen == "mean" else TokenMax()

    def _splits(self, subject: Subject) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The rows of the three splits, and the labels; without a dev split a tenth of train is cut off."""
        from ...research.data.examples import Labels
        from ...research.data.parts import hold_out
        from .reading import Reading, alike, longest

        given = {name: getattr(self, name) for name in ("text_column", "pair_column", "label_column")}
        reading = Reading.of(subject.notes, **given)
        sources = reading.splits(self.data)
        if "test" not in sources:
            raise InputError(f"{self.data}: no test split, on which the neurons found on dev are measured")
        known = subject.notes.get("labels")
        labels = Labels.of(sources["train"]) if known is None else Labels(tuple(known))
        limit = longest(subject.speaker, self.length)
        encoded = {
            split: reading.rows(source, subject.speaker, labels, limit, self.truncate)
            for split, source in sources.items()
        }
        rows = alike(encoded, self.length)
        if "dev" not in rows:
            rows["train"], rows["dev"] = hold_out(rows["train"], 0.1)
        return {split: self._some(each) for split, each in rows.items()}, labels.names

    def _some(self, rows: Any) -> Any:
        """At most `rows` of them, drawn with a fixed seed: labels may come in turn."""
        import numpy as np

        from ...research.data.parts import Part

        drawn = np.random.default_rng(0).permutation(len(rows))[: self.rows or len(rows)]
        return Part(rows, sorted(drawn.tolist()))

    def _batches(self, rows: Any) -> list[Any]:
        from ...research.data.batches import evaluation_batches

        return list(evaluation_batches(rows, self.batch))

    def _shuffled(self, batches: list[Any]) -> list[Any]:
        """The same texts with the labels of others."""
        import numpy as np

        real = [batch["weight"] > 0 for batch in batches]
        labels = np.concatenate([batch["label"][keep] for batch, keep in zip(batches, real)])
        drawn = iter(np.random.default_rng(0).permutation(labels))
        return [
            {**batch, "label": np.asarray([next(drawn) if each else 0 for each in keep], np.int32)}
            for batch, keep in zip(batches, real)
        ]

    def _said(self, names: tuple[Any, ...], dev: Accuracy, test: Accuracy, shuffled: Accuracy) -> list[str]:
        lines = []
        for subtask in range(len(dev.values)):
            chance = test.of(shuffled.top(subtask), subtask)
            lines.append(
                f"{question(names, subtask)} (a neuron chosen by shuffled labels: {chance:.1%} on test)"
            )
            for row in best_neurons(dev, test, subtask, SHOWN):
                layer, neuron, position, high, on_dev, on_test = row
                side = "above" if high else "below"
                lines.append(
                    f"  layer {layer} neuron {neuron} at place {position}: {side} its mean, "
                    f"dev {on_dev:.1%}, test {on_test:.1%}"
                )
        return lines

    def _write(self, out: Path, names: tuple[Any, ...], dev: Accuracy, test: Accuracy) -> None:
        skill_table(names, dev, test, self.fraction).write(out, "neurons")
        layer_table(names, dev).write(out, "layers")

    def _histograms(
        self,
        out: Path,
        names: tuple[Any, ...],
        dev: Accuracy,
        thresholds: Any,
        reader: Any,
        params: Any,
        batches: list[Any],
    ) -> None:
        import jax
        import numpy as np

        from ...research.neurons.figures import label_histograms

        tops = [dev.top(subtask) for subtask in range(len(dev.values))]
        where = [(top.layer, top.position, top.neuron) for top in tops]
        one = jax.jit(lambda p, b: [reader(p, b)[(slice(None), *place)] for place in where])
        kept = [batch["weight"] > 0 for batch in batches]
        label = np.concatenate([batch["label"][keep] for batch, keep in zip(batches, kept)])
        found = [[np.asarray(v)[keep] for v in one(params, b)] for b, keep in zip(batches, kept)]
        for subtask, top in enumerate(tops):
            values = np.concatenate([row[subtask] for row in found])
            by_label = {str(name): values[label == number] for number, name in enumerate(names)}
            title = f"layer {top.layer}, neuron {top.neuron} at place {top.position}, on test"
            threshold = float(thresholds[subtask, top.layer, top.position, top.neuron])
            label_histograms(out / f"neuron_{subtask}.png", title, by_label, threshold)


def question(names: tuple[Any, ...], subtask: int) -> str:
    """What a subtask asks."""
    return f"{names[0]} or {names[1]}" if len(names) == 2 else f"{names[subtask]} or another"


def best_neurons(dev: Accuracy, test: Accuracy, subtask: int, count: int) -> list[tuple[Any, ...]]:
    """The `count` best neurons on dev: layer, neuron, place, direction, accuracy on dev and on test."""
    import numpy as np

    best = dev.predictivity[subtask].max(1)  # [L, F]
    rows = []
    for flat in np.argsort(-best, axis=None, kind="stable")[:count]:
        layer, neuron = np.unravel_index(flat, best.shape)
        position = int(dev.predictivity[subtask, layer, :, neuron].argmax())
        here, there = (float(each.values[subtask, layer, position, neuron]) for each in (dev, test))
        high = here >= 0.5
        rows.append(
            (int(layer), int(neuron), position, high, max(here, 1 - here), there if high else 1 - there)
        )
    return rows


def skill_table(names: tuple[Any, ...], dev: Accuracy, test: Accuracy, fraction: float) -> Table:
    """The skill neurons of every layer, best first."""
    from ...research.neurons import select
    from ...research.study.tables import Table

    mask, rows = select(dev.by_neuron(), fraction), []
    for subtask in range(len(dev.values)):
        for row in best_neurons(dev, test, subtask, mask.size):
            if mask[row[0], row[1]]:
                layer, neuron, position, high, on_dev, on_test = row
                rows.append((question(names, subtask), layer, neuron, position, high, on_dev, on_test))
    return Table(("question", "layer", "neuron", "place", "high is positive", "dev", "test"), tuple(rows))


def layer_table(names: tuple[Any, ...], dev: Accuracy) -> Table:
    """A row a layer and question: the best, the mean and the 99th percentile of predictivity on dev."""
    import numpy as np

    from ...research.study.tables import Table

    best = dev.by_neuron()
    rows = tuple(
        (
            question(names, subtask),
            layer,
            float(found.max()),
            float(np.quantile(found, 0.99)),
            float(found.mean()),
        )
        for subtask, layers in enumerate(best)
        for layer, found in enumerate(layers)
    )
    return Table(("question", "layer", "best", "99th percentile", "mean"), rows)
