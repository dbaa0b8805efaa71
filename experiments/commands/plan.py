"""`modicum plan PRESET`: what fits on what, how fast, at what price, and with --compile its proof; no device
is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ... import InputError

if TYPE_CHECKING:
    from ...models.config import TransformerConfig
    from ...parallel.plan import Job, Search
    from ...parallel.plan import Plan as PlanFound

DESCRIPTIONS = Path(__file__).parents[1] / "bench"  # XLA's of GPUs to compile for


@dataclass(frozen=True)
class Plan:
    """Plan a training run: mesh, ZeRO level, micro-batches and what each layer recomputes.

    Prints memory by kind, the step's time by kind, tokens/s, days and cost, and why the runner-up lost. All
    is arithmetic from shapes and data sheets; docs/results/planner_validation.md says how far off it was.
    """

    model: tyro.conf.Positional[str]
    """A preset, such as gpt3-175b."""
    chip: str = "v5p"
    """v4, v5e, v5p, v6e, 7x, v100, a100-40, a100-80, h100 or h200."""
    topology: str = "4x4x4"
    """Shape of the slice; for GPUs hosts x GPUs used of a host, or how many."""
    batch: int = 1536
    """Rows of a step, over all devices."""
    seq: int | None = None
    """Tokens of a row; by default 2048, or as many as the model has positions for."""
    tokens: float = 0.0
    """Tokens to train on, for days and cost."""
    price: float | None = None
    """US dollars a chip-hour; by default the list price, where one is known."""
    recipe: Literal["modicum", "mixed", "bmtrain", "lean"] | None = None
    """Bytes a parameter: modicum 16 and a copy (all float32), mixed 16, bmtrain 14, lean 12; by default
    mixed, and with --compile modicum, which is what `modicum train` holds."""
    axes: tuple[Literal["data", "fsdp", "tensor", "context", "pipe"], ...] = ("data", "fsdp", "tensor")
    """Mesh axes that the search may use."""
    mesh: str = ""
    """Plan this mesh only, such as fsdp=16,tensor=4."""
    remat: tuple[Literal["none", "dots", "mlp", "middle", "full"], ...] = (
        *("none", "dots", "mlp", "middle"),
        "full",
    )
    """What a layer's backward pass may compute again, as in `modicum train --remat`."""
    offload: bool = False
    """Also consider the host's memory, for optimizer state and activations."""
    chunked_loss: bool = False
    """The loss never holds all logits."""
    stored_scores: bool = False
    """Attention stores its scores (no flash attention)."""
    efficiency: float | None = None
    """Share of the peak that matrix products reach."""
    smallest: bool = False
    """Instead: the smallest slice of the chip on which this fits."""
    compile: bool = False
    """Also compile the train step for this slice, which need not be here (package libtpu, extra tpu)."""
    serve: bool = False
    """Instead: prefill, decoding and cost by batch, with `--seq` tokens of context."""
    serve_batch: tuple[int, ...] = (1, 8, 32, 128, 512)
    """Batches to serve."""
    weights: Literal["half", "int8"] = "half"
    """Numbers of the served weights and cache."""

    def run(self) -> int:
        """Print the plan."""
        from ...models.presets import preset

        self._check()
        config = preset(self.model)
        length = self.seq or min(2048, config.positions.limit or 2048)
        config.positions.require(length)
        print(self._serving(config, length) if self.serve else self._training(config, length), end="")
        return 0

    def _check(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        for name in ("tokens", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value} must be finite and must not be negative")
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency={self.efficiency} must be above 0 and at most 1")
        if self.serve and self.smallest:
            raise InputError("--serve and --smallest are different questions; give one of them")

    def _training(self, config: TransformerConfig, length: int) -> str:
        from ...parallel.plan import Job, Topology, chip, recipe
        from ...research.planning.report import plan_text
        from ...research.planning.tables import layer_table

        bytes_each, on = recipe(self._recipe()), chip(self.chip)
        topology = Topology.parse(on, self.topology)
        search = self._search()
        table = layer_table(
            config,
            length,
            bytes_each,
            name=self.model,
            flash=not self.stored_scores,
            chunked=None if self._recipe() == "modicum" and not self.chunked_loss else self.chunked_loss,
            lanes=on.lanes,
        )
        job = Job(table, bytes_each, self.batch, length)
        if self.smallest:
            least = search.smallest(job, on)
            if least is None:
                mesh = f" with mesh {self.mesh}" if self.mesh else ""
                raise InputError(f"{self.model} at batch {self.batch}{mesh} fits no slice of {self.chip}")
            topology = least.topology
        plans = search.plans(job, topology)
        text = plan_text(job, plans, self.tokens, self.price)
        return text + self._proof(config, job, plans[0]) if self._recipe() == "modicum" else text

    def _recipe(self) -> str:
        if self.compile and self.recipe not in (None, "modicum"):
            raise InputError(
                f"recipe {self.recipe} is not what `modicum train` holds; --compile takes recipe modicum"
            )
        return self.recipe or ("modicum" if self.compile else "mixed")

    def _proof(self, config: TransformerConfig, job: Job, plan: PlanFound) -> str:
        """The command that trains by the plan and, asked for, what its compiler says."""
        from ...parallel.plan.target import target_devices
        from ...research.planning.compiled import lower_plan, prove, trained_config, trained_remat
        from ...research.planning.proof import proof_text, train_command

        try:
            if config.dropout and "," in trained_remat(plan):
                raise InputError("scanned layers with dropout take one policy for all; plan with one --remat")
            text = f"train: {train_command(self.model, plan, job)}\n"
        except InputError as error:
            if self.compile:
                raise
            return f"train: not by this plan; {error}\n"
        if not self.compile:
            return text
        if self.stored_scores:
            raise InputError("--stored-scores is not what `modicum train` does; leave it out to --compile")
        devices = target_devices(plan.topology, DESCRIPTIONS / f"{self.chip}.textproto")
        config = trained_config(config, trained_remat(plan), job.length)
        proof = prove(lower_plan(config, plan.split, job.batch, job.length, devices), plan.split)
        return f"{text}\n{proof_text(plan, job, proof, self._search().assume)}"

    def _search(self) -> Search:
        from ...parallel.mesh import MeshShape
        from ...parallel.plan import Assumptions, Search

        assume = Assumptions() if self.efficiency is None else Assumptions(efficiency=self.efficiency)
        mesh = MeshShape.parse(self.mesh) if self.mesh else None
        return Search(self.axes, self.remat, offload=self.offload, mesh=mesh, assume=assume)

    def _serving(self, config: TransformerConfig, length: int) -> str:
        from ...models.costs import parameter_count
        from ...models.transformer import Transformer
        from ...parallel.plan import Topology, chip
        from ...research.planning.report import cache_line, remembered_note, serving_table
        from ...research.planning.serving import serving_of

        if min(self.serve_batch, default=1) < 1:
            raise InputError(f"serve_batch={min(self.serve_batch)} must be at least 1")
        on = chip(self.chip)
        chips = Topology.parse(on, self.topology).size
        number = 2 if self.weights == "half" else 1
        count = parameter_count(Transformer(config))
        reached = 1.0 if self.efficiency is None else self.efficiency
        served = serving_of(config, count, on, chips, number, reached)
        price = on.price if self.price is None else self.price
        table = serving_table(served, self.serve_batch, length, price)
        cache = f"{served.cache_bytes / 1024:,.1f} KiB ({cache_line(config, number)})"
        return (
            f"{self.model} on {chips} {on.name}: {count:,} parameters, cache of {cache} a token, at most "
            f"{served.largest_batch(length):,} rows of {length} tokens\n"
            f"at {served.efficiency:.0%} of bandwidth and peak, sums over chips left out:\n\n"
            f"{table.markdown()}" + "".join(f"{line}\n" for line in remembered_note(on))
        )
