"""What the study of sparse activation says of its claims, from its figures."""

from __future__ import annotations

from statistics import fmean, stdev

from ..models.sparse_activations import StatisticalTopK, TopK
from .sparse_activation_cells import (
    Results,
    base_of,
    base_sized,
    grouped,
    mean_of,
    natural,
    neuron_series,
    seeds_of,
    trainings,
)

CLAIMED_INPUTS = 0.8  # activate less than 5% of the neurons
ALMOST_ALL = 0.95
LOSS = 0.01  # nats; smaller differences count as equal loss


def verdicts(results: Results) -> str:
    """Sentences on the claims with their figures and number of seeds, as a Markdown list."""
    sizes = grouped(natural(results), "width", "layers", "F")
    sparsest = max(sizes.values(), key=lambda runs: mean_of(runs, "below 5%"))
    most = mean_of(sparsest, "below 5%")
    least = min(mean_of(runs, "ever active") for runs in sizes.values())
    seeds = seeds_of(*sizes.values())
    lines = [
        f"80% of inputs activate less than 5% of the neurons: {said(most >= CLAIMED_INPUTS)} (at most "
        f"{most:.1%} of the inputs, of {len(sizes)} sizes; {seeds}).",
        f"Almost every neuron is active for some input: {said(least >= ALMOST_ALL)} (at least {least:.1%}; "
        f"{seeds}).",
        *(larger(name, series, by) for name, series, by in axes(results)),
        counts_line(results),
        *noise_lines(results),
        *(cheapest(results, kind) for kind in (TopK, StatisticalTopK)),
    ]
    return "".join(f"* {line}\n" for line in lines if line)


def axes(results: Results) -> list[tuple[str, Results, str]]:
    """Names and cells of the three ways to be larger, and the field that grows."""
    base = base_of(results)
    found = natural(results)
    four = [one for one in found if one["F"] == 4 * one["width"]]
    return [
        ("wider", [one for one in four if one["layers"] == base["layers"]], "width"),
        ("deeper", [one for one in four if one["width"] == base["width"]], "layers"),
        ("with more neurons a layer", neuron_series(results), "F"),
    ]


def larger(name: str, found: Results, by: str) -> str:
    """Whether the largest is sparser than the smallest, and whether each is than the one before."""
    series = sorted(((key, runs) for (key,), runs in grouped(found, by).items()), key=lambda each: each[0])
    if len(series) < 2:
        return ""
    means = [mean_of(runs, "active") for _, runs in series]
    apart = beyond(means[0] - means[-1], series[0][1], series[-1][1], "active", 0.005)
    way = ", ".join(f"{key}: {100 * value:.1f}%" for (key, _), value in zip(series, means))
    way += f"; {seeds_of(*(runs for _, runs in series))}"
    steady = "" if sorted(means, reverse=True) == means else "; not at every step"
    return f"Decoders {name} are sparser: {said(apart)}{steady if apart else ''} ({by} {way})."


def counts_line(results: Results) -> str:
    """How the number of active neurons grows with that of all."""
    found = grouped(neuron_series(results), "F")
    if len(found) < 2:
        return ""
    (least, few), (most, many) = (pick(found.items(), key=lambda each: each[0]) for pick in (min, max))
    counts = [mean_of(runs, "active") * runs[0]["F"] for runs in (few, many)]
    more, active = most[0] / least[0], counts[1] / counts[0]
    return (
        f"With {more:.0f} times as many neurons a layer, {active:.1f} times as many are active ("
        f"{counts[0]:.0f} of {least[0]}, {counts[1]:.0f} of {most[0]}; {seeds_of(few, many)})."
    )


def noise_lines(results: Results) -> list[str]:
    """Whether neurons fall silent without anything to learn."""
    lines = []
    for (data,), runs in grouped(trainings(results), "data").items():
        first = fmean(run["steps"][0]["active"] for run in runs)
        last = fmean(run["steps"][-1]["active"] for run in runs)
        word = said(last < first - 0.005)
        figures = f"{first:.1%} to {last:.1%} active; {seeds_of(runs)}"
        lines.append(f"Training on {data} makes neurons silent: {word} ({figures}).")
    return lines


def cheapest(results: Results, kind: type) -> str:
    """The fewest neurons that a kind of top-k needs for ReLU's loss."""
    found = base_sized(results)
    dense = found["relu"]
    tried = [runs for runs in found.values() if isinstance(runs[0]["activation"], kind)]
    equal = [
        runs
        for runs in tried
        if not beyond(mean_of(runs, "loss") - mean_of(dense, "loss"), runs, dense, "loss", LOSS)
    ]
    if not tried:
        return ""
    name, seeds = "Top-k" if kind is TopK else "Statistical top-k", seeds_of(dense, *tried)
    if not equal:
        return f"{name} reaches ReLU's loss: does not hold at any k that was tried ({seeds})."
    best = min(equal, key=lambda runs: mean_of(runs, "active"))
    fewer = said(mean_of(best, "active") < mean_of(dense, "active"))
    mine, own = ((mean_of(runs, "active"), mean_of(runs, "loss")) for runs in (best, dense))
    return (
        f"{name} reaches ReLU's loss with fewer neurons: {fewer} (k={best[0]['activation'].k}: {mine[0]:.1%} "
        f"active, loss {mine[1]:.3f}; ReLU {own[0]:.1%}, {own[1]:.3f}; {seeds})."
    )


def beyond(gap: float, one: Results, other: Results, name: str, least: float) -> bool:
    """Whether a gap is more than `least` and, where there are seeds, than two deviations of a difference."""
    values = [[run[name] for run in runs] for runs in (one, other)]
    spread = sum(stdev(each) ** 2 for each in values if len(each) > 1) ** 0.5
    return gap > max(least, 2 * spread)


def said(holds: bool) -> str:
    """The word of docs/claims.md."""
    return "holds at this scale" if holds else "does not hold at this scale"
