"""Attention on the GPU at hand beside its peers, within some minutes, and whether it is fast enough to ship.

    python -m modicum.experiments.bench.attention_gpu FOLDER --minutes 8

What decides comes first: a machine with a GPU may be lent for minutes only. Needs JAX and NumPy; PyTorch
takes part where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ... import InputError
from ...research.study.tables import Table
from .attention import Report, Seen, measure_attention
from .attention_job import AttentionJob
from .attention_report import summary, write

OURS, CUDNN = "hopper", "jax.nn cuDNN"
SLOW = ("plain softmax", "chunked", "jax.nn", "whole", "cudnn")
"""Contenders that take long, or another's place."""
FORWARD, BACKWARD, WITH_BIAS, TILES_LEFT_OUT = 0.85, 0.75, 2.0, 0.8
"""To be reached: twice parts of cuDNN's speed, times its speed, a part of the speed of live tiles alone."""
GATED = 4096
"""The least length for which anything has to be reached."""


@dataclass(frozen=True)
class Case:
    """A job at some lengths; `torch` says whether PyTorch takes part, which writes most masks out."""

    name: str
    job: AttentionJob
    lengths: tuple[int, ...]
    torch: bool = False


@dataclass(frozen=True)
class Gate:
    """One thing to be reached; `found` is None where it was not measured."""

    what: str
    case: str
    length: int
    found: float | None
    wanted: float

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not measured" if self.found is None else "pass" if self.found >= self.wanted else "miss"


def cases() -> Iterator[Case]:
    """In the order of what they decide."""

    def job(**changes: object) -> AttentionJob:
        return AttentionJob(**{"heads": 16, "kv_heads": 16, "width": 128, "dtype": "bfloat16"} | changes)  # type: ignore[arg-type]

    yield Case("causal-128", job(), (4096, 16384), torch=True)
    yield Case("full-128", job(mask="full"), (4096, 16384), torch=True)
    yield Case("dense-128", job(mask="full", bias="dense"), (4096,), torch=True)
    yield Case("window-128", job(mask="window"), (4096, 16384))
    yield Case("packed-128", job(mask="packed"), (4096, 16384))
    yield Case("groups-128", job(heads=32, kv_heads=8), (4096, 8192))
    yield Case("causal-64", job(width=64), (4096, 16384), torch=True)
    yield Case("full-64", job(width=64, mask="full"), (4096, 16384), torch=True)
    yield Case("causal-128-others", job(), (2048, 8192, 32768), torch=True)
    yield Case("alibi-128", job(bias="alibi"), (4096,))
    yield Case("bucketed-128", job(mask="full", bias="bucketed"), (4096,))
    yield Case("dense-64", job(width=64, mask="full", bias="dense"), (4096,))
    yield Case("full-128-others", job(mask="full"), (2048, 8192, 32768))
    yield Case("causal-64-others", job(width=64), (2048, 8192, 32768))
    yield Case("window-64", job(width=64, mask="window"), (4096, 16384))
    yield Case("packed-64", job(width=64, mask="packed"), (4096, 16384))


def seconds(seen: Mapping[str, Seen], case: str, length: int, name: str, backward: bool) -> float | None:
    """Of one call, the median: of the forward pass, or of the backward pass alone."""
    if case not in seen:
        return None
    found = {
        timed.backward: median(timed.wall)
        for timed in seen[case].timed
        if (timed.contender, timed.length) == (name, length) and timed.wall
    }
    if not backward:
        return found.get(False)
    return found[True] - found[False] if len(found) == 2 else None


def gates(seen: Mapping[str, Seen], planned: Iterable[Case]) -> Iterator[Gate]:
    """What each case at each length has to reach, as far as `seen` tells."""
    for case in planned:
        for length in (x for x in case.lengths if x >= GATED and case.job.width == 128):
            for backward in (False, True):
                if case.job.mask in ("window", "packed"):
                    yield _of_live_tiles(seen, case, length, backward)
                times = [seconds(seen, case.name, length, name, backward) for name in (CUDNN, OURS)]
                what = "backward" if backward else "forward"
                wanted = BACKWARD if backward else FORWARD
                if case.job.bias == "dense":
                    yield Gate(f"{what}, times cuDNN", case.name, length, _ratio(*times), WITH_BIAS)
                elif case.job.bias == "none" and case.job.mask in ("full", "causal"):
                    yield Gate(f"{what}, of cuDNN's speed", case.name, length, _ratio(*times), wanted)


def _of_live_tiles(seen: Mapping[str, Seen], case: Case, length: int, backward: bool) -> Gate:
    """What the live tiles would take at the speed without a mask, over the time taken."""
    whole = seconds(seen, "full-128", length, OURS, backward)
    taken = seconds(seen, case.name, length, OURS, backward)
    live = None if whole is None else whole * case.job.live_fraction(length)
    what = f"{'backward' if backward else 'forward'}, of its live tiles' speed"
    return Gate(what, case.name, length, _ratio(live, taken), TILES_LEFT_OUT)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def gate_table(found: Sequence[Gate]) -> Table:
    """A row a gate."""
    rows = tuple(
        (g.case, g.length, g.what, None if g.found is None else round(g.found, 3), g.wanted, g.verdict)
        for g in found
    )
    return Table(("case", "length", "what", "found", "wanted", "verdict"), rows)


def measure_all(
    out: Path, minutes: float, rounds: int, planned: Sequence[Case], report: Report = print
) -> dict[str, Seen]:
    """Measure case after case until the time is over, each written to a folder of its own name in `out`.

    What has to be reached is written after each, as nobody knows when the machine is taken away.
    A case of which nobody is left is reported and left out; one that has begun is finished.
    """
    start, seen = time.monotonic(), {}
    for number, case in enumerate(planned):
        if time.monotonic() - start > 60 * minutes:
            report(
                f"{minutes:g} minutes are over; not measured: {', '.join(c.name for c in planned[number:])}"
            )
            break
        without = SLOW if case.torch else (*SLOW, "SDPA")
        try:
            found = measure_attention(
                case.job, lengths=case.lengths, rounds=rounds, without=without, report=lambda _: None
            )
        except (InputError, RuntimeError) as error:
            report(f"{case.name}: {error}")
            continue
        seen[case.name] = found
        write(found, out / case.name)
        gate_table(list(gates(seen, planned))).write(out, "gates")
        report(f"## {case.name}, {time.monotonic() - start:.0f} s since the start\n\n{summary(found)}")
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write and print the gates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the tables")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after so many")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    given = parser.parse_args(arguments)
    planned = list(cases())
    seen = measure_all(given.out, given.minutes, given.rounds, planned)
    print(f"# Gates\n\n{gate_table(list(gates(seen, planned))).markdown()}")


if __name__ == "__main__":
    main()
