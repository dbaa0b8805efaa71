"""Published runs predicted: the utilisation that the cost model gives beside the one that was reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...parallel.mesh import MeshShape
from ...parallel.plan import Assumptions, Job, LayerTable, Plan, Search, Topology, chip, recipe
from .published import Run
from .tables import layer_table
from .training import utilisation


@dataclass(frozen=True)
class Prediction:
    """What the model says of a run, by default and with the efficiency that the other runs ask for."""

    run: Run
    plan: Plan
    mfu: float
    asked: float  # the efficiency under which the prediction would be exact
    held_out: float  # the prediction with the median of what the other runs ask for

    @property
    def error(self) -> float:
        """Relative error of the prediction by default."""
        return self.mfu / self.run.figure - 1

    @property
    def held_out_error(self) -> float:
        """Relative error of the prediction in which the run itself had no say."""
        return self.held_out / self.run.figure - 1


@dataclass(frozen=True)
class Case:
    """A run with the table and the chips it is planned on."""

    run: Run
    table: LayerTable
    topology: Topology

    @classmethod
    def of(cls, run: Run) -> Case:
        """The case of a run."""
        on = chip(run.chip)
        table = layer_table(
            *(run.config, run.length, recipe(run.recipe)),
            name=run.name,
            flash=run.flash,
            chunked=run.chunked,
            lanes=on.lanes,
        )
        return cls(run, table, Topology.parse(on, run.topology))

    def plan(self, assume: Assumptions) -> Plan:
        """The run's own mesh where it is known, else the best plan found."""
        run = self.run
        search = Search(
            axes=run.axes,
            remats=run.remat,
            sequence=run.sequence,
            mesh=MeshShape.parse(run.mesh) if run.mesh else None,
            accumulate=run.micro or None,
            interleave=run.interleave,
            assume=assume,
        )
        return search.plans(Job(self.table, recipe(run.recipe), run.batch, run.length), self.topology)[0]

    def mfu(self, plan: Plan) -> float:
        """Utilisation in the run's own convention."""
        run, peak = self.run, self.topology.chip.flops(self.topology.chip.half)
        return utilisation(
            counted_flops(run), run.batch * run.length / plan.time.total, self.topology.size, peak
        )


def counted_flops(run: Run) -> float:
    """Operations a token that the run's figure counts."""
    share = {"6N": 0.0, "causal": 0.5, "whole": 1.0}[run.convention]
    config = run.config
    heads = config.attention.heads * config.attention.width_of_head(config.width)
    return 6.0 * run.parameters + share * 12.0 * config.layers * heads * run.length


def asked_efficiency(case: Case, plan: Plan, assume: Assumptions) -> float:
    """The efficiency of products with which the plan would take exactly the reported time; nan where none
    does.
    """
    run, time = case.run, plan.time
    peak = case.topology.chip.flops(case.topology.chip.half)
    reported = counted_flops(run) * run.batch * run.length / (case.topology.size * peak * run.figure)
    pipe, micro = plan.split.mesh.pipe, plan.split.accumulate
    left = reported / (1 + (pipe - 1) / micro / plan.split.interleave) - time.memory - time.exposed
    return time.compute * assume.efficiency / left if left > 0 else math.nan


def predict(runs: Sequence[Run], assume: Assumptions | None = None) -> list[Prediction]:
    """Predict every run, once as the library does by default and once from the other runs alone."""
    assume = assume or Assumptions()
    cases = [Case.of(run) for run in runs]
    plans = [case.plan(assume) for case in cases]
    asked = [asked_efficiency(case, plan, assume) for case, plan in zip(cases, plans)]
    found = []
    for index, (case, plan) in enumerate(zip(cases, plans)):
        others = [value for other, value in enumerate(asked) if other != index and not math.isnan(value)]
        held_out = replace(assume, efficiency=min(1.0, statistics.median(others)))
        alone = case.mfu(case.plan(held_out))
        found.append(Prediction(case.run, plan, case.mfu(plan), asked[index], alone))
    return found
