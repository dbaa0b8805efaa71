"""`modicum sparsity MODEL --data DATA`: which neurons fire, and the model made to use only some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ... import InputError
from .options import UNLIMITED_LENGTH, refuse_unused
from .relufy import Cut, RelufyOptions

if TYPE_CHECKING:
    from ...parallel.layout import Layout
    from ...research.sparsity.moefication import Moefication, Moefied
    from ...research.sparsity.survey import Surveyed
    from .language_models import LanguageModel

ROWS = 32  # that are read at once


@dataclass(frozen=True)
class Sparsity:
    """Measure which feed-forward neurons fire; make a model in which fewer do, or one that computes a share.

    MODEL is a published checkpoint (its folder or its name on the Hugging Face hub) or what `modicum train`
    left. What --relufy and --moefy write to OUT/model is a model folder that `modicum generate` and `modicum
    evaluate` take. Of a published encoder-decoder the encoder is measured.
    """

    model: tyro.conf.Positional[str]
    data: tuple[str, ...]
    """Files, folders with splits, or hub names; of several each is measured by itself too."""
    out: Path | None = None
    """Folder for tables, report.html and the converted model."""
    split: Literal["train", "dev", "test"] = "train"
    text_column: str = "text"
    rows: int = 256
    """Rows of text that are measured, evenly spread over each of the data."""
    length: int = 0
    """Tokens of a row; 0: as many as the model has positions, 128 where these have no limit."""
    threshold: float = 0.0
    """An activation above this counts as active."""
    sizes: bool = False
    """Compare the activations' sizes with the threshold: for functions and products that are negative too."""
    site: Literal["act", "mid"] = "act"
    """What the activation function returns, or what a gated layer's last product takes."""
    pairs: bool = False
    """Count also which two neurons fire together: a square of numbers for each layer."""
    mesh: str = ""
    """Devices along each axis to measure on, such as data=4,tensor=2; empty: the first device."""
    relufying: RelufyOptions = field(default_factory=RelufyOptions)
    moefy: str = ""
    """The share of the neurons that each token shall use, such as 20%."""
    neurons: int = 32
    """Neurons of an expert."""
    partition: Literal["clusters", "co-activation", "contiguous", "random"] = "clusters"
    """How neurons are grouped: by their input weights, by which fire together, in blocks, by chance."""
    router: Literal["mlp", "low-rank", "centres", "similarity", "oracle"] = "mlp"
    """What chooses experts: a trained network, a narrow one, distance or angle to the experts' centres, or
    the neurons themselves (which saves nothing)."""
    rank: int = 16
    """Of the low-rank router."""
    tokens: int = 8192
    """Tokens from which experts and router are made; a tenth of them only measures."""
    seed: int = 0
    ignore: tuple[str, ...] = ()
    """Keys of a published config.json to pass over although nobody here knows them."""

    def run(self) -> int:
        """Print the tables, and write what was asked for."""
        from ...research.sparsity.statistics import Counter
        from ..sparsity_report import Measured, write_measured
        from .compilation import cache_compilations

        wanted, layout = self._checked()
        cache_compilations()
        speaker = self._open()
        texts = {name: self._cut(speaker, name) for name in self.data}
        batches = {name: self._batches(speaker, cut) for name, cut in texts.items()}
        every = [batch for own in batches.values() for batch in own]
        relufied = was = None
        if self.relufying.relufy:
            was = Counter(speaker.model, self._sites, self.threshold, self.sizes).measure(
                speaker.params, every
            )
            speaker, relufied = self.relufying.train(speaker, texts.values(), self.seed)
            self._save(speaker, None)  # whatever may yet be refused
        found = self._surveyed(speaker, batches, layout)
        moefied = None if wanted is None else self._convert(speaker, every, wanted)
        print(write_measured(self.out, Measured(self.model, found, moefied, relufied, was)))
        if moefied is not None:
            self._save(speaker, moefied)
        return 0

    def _checked(self) -> tuple[Moefication | None, Layout]:
        """What is to be made, and where it is measured; refuses what can be before anything is read."""
        if not self.data:
            raise InputError("--data names no data; give at least one")
        require_different(self.data)
        self.relufying.require_use()
        wanted = self._wanted()
        if self.relufying.relufy:
            self._out()
            self.relufying.wanted(self.seed)
        return wanted, self._layout()

    @property
    def _sites(self) -> tuple[str, ...]:
        return (f"mlp/{self.site}",)

    def _surveyed(
        self, speaker: LanguageModel, batches: Mapping[str, Sequence[Any]], layout: Layout
    ) -> dict[str, Surveyed]:
        """What is found in each source, parameters and rows lying where `layout` says."""
        import jax

        from ...models.placement import placed
        from ...research.sparsity.statistics import Counter
        from ...research.sparsity.survey import Survey

        survey = Survey(Counter(speaker.model, self._sites, self.threshold, self.sizes, self.pairs))
        measure = placed(survey.measure, layout)
        params = jax.device_put(speaker.params, layout.parameters(speaker.params, speaker.model.axes))
        return {name: measure(params, map(layout.place, own)) for name, own in batches.items()}

    def _layout(self) -> Layout:
        """Where parameters and rows lie while they are measured."""
        from ...parallel.layout import Layout
        from ...parallel.mesh import MeshShape, make_mesh

        if not self.mesh:
            return Layout.single()
        if self.moefy or self.relufying.relufy:
            asked = "--moefy" if self.moefy else "--relufy"
            raise InputError(
                f"{asked} computes on one device; leave out --mesh, which is for measuring alone"
            )
        layout = Layout(make_mesh(MeshShape.parse(self.mesh)))
        layout.local_rows(ROWS)  # refuses a mesh over which they do not divide
        return layout

    def _wanted(self) -> Moefication | None:
        if not self.moefy:
            names = ("neurons", "partition", "router", "rank", "tokens")
            refuse_unused(self, names, "nothing is cut into experts without --moefy SHARE")
            return None
        if self.router != "low-rank":
            refuse_unused(self, ["rank"], f"--router {self.router} has no rank; low-rank has")
        from ...research.sparsity.moefication import Moefication
        from ...research.sparsity.routing import Fitting

        self._out()
        if self.relufying.relufy and self.relufying.relufy_to not in ("relu", "relu2"):
            raise InputError(
                f"--moefy cannot cut layers of --relufy-to {self.relufying.relufy_to} into experts; relu and "
                f"relu2 it can"
            )
        fitting = Fitting(seed=self.seed)
        return Moefication(
            share_of(self.moefy),
            self.neurons,
            self._partition(),
            self._selection(),
            self.tokens,
            fitting,
            self.seed,
        )

    def _out(self) -> Path:
        if self.out is None:
            asked = "--moefy" if self.moefy else "--relufy"
            raise InputError(f"{asked} writes a model: give --out FOLDER")
        return self.out

    def _partition(self) -> Any:
        from ...research.sparsity import partitions

        return {
            "clusters": partitions.Clusters(),
            "co-activation": partitions.CoActivation(),
            "contiguous": partitions.Contiguous(),
            "random": partitions.Shuffled(),
        }[self.partition]

    def _selection(self) -> Any:
        from ...models import selection

        return {
            "mlp": selection.MLPSelection(),
            "low-rank": selection.LowRankSelection(self.rank),
            "centres": selection.CentreSelection("distance"),
            "similarity": selection.CentreSelection("cosine"),
            "oracle": selection.OracleSelection(),
        }[self.router]

    def _open(self) -> LanguageModel:
        """The model with whatever head it has; a published encoder-decoder's encoder."""
        from ...models.heads import LanguageModelHead
        from ...models.pretrained import load_pretrained
        from .language_models import is_own, open_body, open_language_model, open_own, require_plain_prompts

        if is_own(self.model):
            opened = open_own(self.model)
            if opened.model.config.kind == "encoder-decoder":
                raise InputError(f"{self.model} is an encoder-decoder, whose targets are not in texts alone")
            return opened
        published = load_pretrained(self.model, ignore=self.ignore)
        require_plain_prompts(self.model, published)
        whole = published.model.config.kind == "decoder" and isinstance(
            published.model.head, LanguageModelHead
        )
        if whole:
            return open_language_model(self.model, "float32", self.ignore)
        return replace(open_body(self.model, self.ignore), stops=())

    def _cut(self, speaker: LanguageModel, name: str) -> Cut:
        """Texts in rows of at most `length` tokens; a decoder's texts go on over several rows."""
        import numpy as np

        from ...research.data.sources import load_source

        config = speaker.model.config
        config.positions.require(self.length)
        length = self.length or config.positions.limit or UNLIMITED_LENGTH
        if self.rows < 1:
            raise InputError(f"rows={self.rows} must be at least 1")
        texts = list(load_source(name, self.split, self.text_column).texts())
        limit = None if config.kind == "decoder" else length
        ids = [row for row in speaker.tokenizer.encode_all(texts, limit, True) if row]
        cut = [row[start : start + length] for row in ids for start in range(0, len(row), length)]
        if not cut:
            raise InputError(f"{name}: no text has a token of this model's vocabulary")
        evenly = np.linspace(0, len(cut) - 1, min(self.rows, len(cut)))
        chosen = set(evenly.round().astype(int).tolist())
        return Cut(
            [cut[number] for number in sorted(chosen)],
            [row for number, row in enumerate(cut) if number not in chosen],
            length,
        )

    def _batches(self, speaker: LanguageModel, cut: Cut) -> list[dict[str, Any]]:
        """Rows filled up to one length, `ROWS` at a time."""
        import numpy as np

        rows = cut.measured
        tokens = np.full((-(-len(rows) // ROWS) * ROWS, cut.length), speaker.tokenizer.pad, np.int32)
        segments = np.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], segments[number, : len(row)] = row, 1
        return [
            {"tokens": tokens[first : first + ROWS], "segments": segments[first : first + ROWS]}
            for first in range(0, len(tokens), ROWS)
        ]

    def _convert(self, speaker: LanguageModel, batches: list[dict[str, Any]], wanted: Moefication) -> Moefied:
        from ...research.sparsity.moefication import moefy

        return moefy(speaker.model, speaker.params, batches, wanted)

    def _save(self, speaker: LanguageModel, moefied: Moefied | None) -> None:
        from ...research.training.model_folder import find_model, load_model, save_model
        from .language_models import is_own

        made = speaker if moefied is None else moefied
        labels, notes = (), dict[str, Any]()
        if is_own(self.model):
            trained = load_model(find_model(Path(self.model)))
            labels, notes = trained.labels, dict(trained.notes)
        notes |= {"moefied" if moefied else "relufied": self.model}
        notes |= {"stops": list(speaker.stops), "start": speaker.start}
        save_model(
            self._out() / "model", made.model, made.params, tokenizer=speaker.kept, labels=labels, notes=notes
        )
        print(f"the {'converted' if moefied else 'changed'} model is in {self._out() / 'model'}")


def require_different(data: Sequence[str]) -> None:
    """Raise `InputError` where one source is given twice: its rows would count double."""
    seen: dict[str, str] = {}
    for name in data:
        place = str(Path(name).resolve()) if Path(name).exists() else name
        if place in seen:
            raise InputError(f"--data names {seen[place]} twice ({name}); give each source once")
        seen[place] = name


def share_of(text: str) -> float:
    """`20%` or `0.2` as 0.2; raises `InputError` for what is not above 0 and at most 100%."""
    try:
        number = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        raise InputError(f"--moefy {text!r} is no share of the neurons; 20% is valid") from None
    if not 0.0 < number <= 1.0:
        raise InputError(f"--moefy {text} is no share of the neurons; above 0 and at most 100% is valid")
    return number
