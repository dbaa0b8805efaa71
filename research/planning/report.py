"""A plan, and serving, as text for people: what it takes by kind, what it costs, why the runner-up lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ...models.config import TransformerConfig
from ...parallel.plan import Chip, Job, Plan
from ..study.tables import Cell, Table
from .serving import Serving, cache_bytes_per_token
from .training import TrainingCost, utilisation

GIB = 2**30


def plan_text(job: Job, plans: Sequence[Plan], tokens: float, price: float | None) -> str:
    """The best of `plans` (the fastest first) in full, and what its runner-up lost by."""
    best = plans[0]
    rate = job.tokens / best.time.total
    chip, chips = best.topology.chip, best.topology.size
    useful = utilisation(job.table.useful, rate, chips, chip.flops(chip.half))
    lines = [
        f"{job.table.name}: {job.table.parameters:,} parameters, batch {job.batch} x {job.length} tokens, "
        f"{best.topology} {chip.name} ({chips} chips)",
        f"plan: {best}; {_remats(best)}",
        "",
        memory_table(best).markdown(),
        time_table(best).markdown(),
        f"{rate:,.0f} tokens/s, {rate / chips:,.0f} a chip; MFU {useful:.1%} (causal half, nothing "
        f"recomputed)",
    ]
    lines += _cost_lines(tokens, rate, chips, price, chip)
    lines += [why_runner_up_lost(plans), *remembered_note(chip)]
    return "\n".join(line for line in lines if line is not None) + "\n"


def memory_table(plan: Plan) -> Table:
    """GiB of a device by kind."""
    rows: list[tuple[Cell, ...]] = [
        (kind, round(size / GIB, 2)) for kind, size in plan.memory.items() if kind != "host" or size
    ]
    capacity = plan.topology.chip.memory / GIB
    rows.append((f"total (of {capacity:.1f})", round(plan.memory.total / GIB, 2)))
    return Table(("memory of a device", "GiB"), tuple(rows))


def time_table(plan: Plan) -> Table:
    """Seconds of a step by kind, and of the communication by mesh axis, hidden or not."""
    time = plan.time
    rows: list[tuple[Cell, ...]] = [
        ("compute", _round(time.compute)),
        ("memory traffic", _round(time.memory)),
        ("communication that cannot hide", _round(time.exposed)),
    ]
    rows += [(f"  of all over {axis}", _round(seconds)) for axis, seconds in time.communication.items()]
    rows += [("pipeline bubble", _round(time.bubble))] if time.bubble else []
    rows.append(("step", _round(time.total)))
    return Table(("time of a step", "s"), tuple(rows))


def why_runner_up_lost(plans: Sequence[Plan]) -> str:
    """One line on the best plan with another mesh or ZeRO level."""
    best = plans[0]
    other = next((plan for plan in plans if _shape(plan) != _shape(best)), None)
    if other is None:
        return "runner-up: no other mesh or ZeRO level fits"
    lost = other.time.total - best.time.total
    parts = {
        "compute (more recomputed)": other.time.compute - best.time.compute,
        "memory traffic": other.time.memory - best.time.memory,
        "communication": other.time.exposed - best.time.exposed,
        "pipeline bubble": other.time.bubble - best.time.bubble,
    }
    kind, most = max(parts.items(), key=lambda item: item[1])
    text = f"runner-up: {other} ({_remats(other)})"
    if lost < 1e-3 * best.time.total:
        return (
            f"{text}: as fast within 0.1%, {(other.memory.total - best.memory.total) / GIB:+.2f} GiB a device"
        )
    return f"{text}: {lost / best.time.total:.1%} slower, most of it {kind}: {most:+.3g} s a step"


def cache_line(config: TransformerConfig, number: float) -> str:
    """KiB a token of the cache with as many key/value heads as heads, 8 of them, and one."""
    heads, layer = config.attention.heads, replace(config, pattern=())
    kinds = {"multi-head": heads, "grouped, 8 key/value heads": 8, "multi-query": 1}
    sizes = [
        f"{name} {cache_bytes_per_token(with_groups(layer, groups), number) / 1024:,.1f}"
        for name, groups in kinds.items()
        if heads % groups == 0 and (groups in (1, heads) or groups < heads)
    ]
    return ", ".join(sizes)


def with_groups(config: TransformerConfig, groups: int) -> TransformerConfig:
    """The configuration with so many key/value heads."""
    return replace(config, attention=replace(config.attention, kv_heads=groups))


def serving_table(serving: Serving, batches: Sequence[int], length: int, price: float | None) -> Table:
    """Decoding and prefill by batch: the bound, or what `efficiency` leaves of it."""
    rows: list[tuple[Cell, ...]] = []
    for rows_of_batch in batches:
        step = serving.step_seconds(rows_of_batch, length)
        per_second = serving.tokens_per_second(rows_of_batch, length)
        power = serving.chip.power
        rows.append(
            (
                rows_of_batch,
                _round(serving.prefill_seconds(rows_of_batch, length) * 1e3),
                _round(step * 1e3),
                _round(per_second),
                None if price is None else _round(serving.dollars_per_million(rows_of_batch, length, price)),
                None if power is None else _round(serving.joules_per_token(rows_of_batch, length, power)),
                _round(serving.memory(rows_of_batch, length) / serving.chips / GIB),
                serving.memory(rows_of_batch, length) <= serving.chips * serving.chip.memory,
            )
        )
    columns = (
        *("batch", "prefill ms", "ms a token", "tokens/s", "$ a million tokens", "J a token"),
        *("GiB a chip", "fits"),
    )
    return Table(columns, tuple(rows), f"{length} tokens of context")


def _cost_lines(tokens: float, rate: float, chips: int, price: float | None, chip: Chip) -> list[str]:
    if not tokens:
        return []
    cost = TrainingCost(tokens, chips, rate, chip.price if price is None else price, chip.power)
    text = f"{tokens:.3g} tokens: {cost.days:,.1f} days, {cost.chip_hours:,.0f} chip-hours"
    if cost.dollars is not None:
        text += f", ${cost.dollars:,.0f} at ${cost.price:g} a chip-hour"
    else:
        text += "; no price is known for this chip, give --price"
    if cost.kilowatt_hours is not None:
        text += f", {cost.kilowatt_hours / 1000:,.0f} MWh at {chip.power:g} W a chip"
    return [text]


def remembered_note(chip: Chip) -> list[str]:
    """A line naming the figures of the chip that were not read in a source; none where all were."""
    if not chip.remembered:
        return []
    return [f"note: of {chip.name}, {', '.join(chip.remembered)} is remembered and was not read in a source"]


def _remats(plan: Plan) -> str:
    counts = Counter(plan.choices)
    text = ", ".join(f"{name} on {count} layers" for name, count in counts.items())
    return f"remat {text}" + (" of a stage" if plan.split.mesh.pipe > 1 else "")


def _shape(plan: Plan) -> tuple[object, ...]:
    return plan.split.mesh, plan.split.zero, plan.split.offload


def _round(value: float) -> float:
    return float(f"{value:.4g}")
