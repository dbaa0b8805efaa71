"""What the study of MoEfication says of its claims, from its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .moefication_work import HEADLINE, THRESHOLD, TRAINED

Results = Sequence[Mapping[str, Any]]
Runs = Mapping[int, float]  # what is left of the accuracy in %, by seed

KEPT = 97.0  # per cent of the dense model's quality
FREE = ("centres", "similarity")  # routers
POINT = 1.0  # smaller differences count as none


def verdicts(results: Results) -> str:
    """Sentences on the claims about one model at 20% of the neurons, as a Markdown list."""
    values = {key: {run["seed"]: kept(run) for run in runs} for key, runs in grouped(results, HEADLINE)}
    clusters, random = values.get(("clusters", "MLP")), values.get(("random", "MLP"))
    best, chance = values.get(("clusters", "oracle")), values.get(("random", "oracle"))
    lines = [
        kept_line(clusters),
        least_line(results),
        worse_line("Random experts", clusters, random),
        worse_line("With an oracle, random experts", best, chance),
        router_line(values),
        training_line(values),
        recall_line(results),
        threshold_line(values, clusters),
    ]
    return "".join(f"* {line}\n" for line in lines if line)


def kept_line(clusters: Runs | None) -> str:
    """Whether clusters with the MLP router keep what is claimed."""
    if not clusters:
        return ""
    word = said(fmean(clusters.values()) >= KEPT)
    return (
        f"At {HEADLINE:.0%} of the neurons, clusters with the MLP router keep at least {KEPT:.0f}% of the "
        f"accuracy: {word} ({told(clusters.values())})."
    )


def least_line(results: Results) -> str:
    """The smallest share at which a trained router keeps as much, and which; nothing if none was run."""
    if not any(one["router"] in TRAINED for one in results):
        return ""
    for share in sorted({one["share"] for one in results}):
        found = {
            key: [kept(run) for run in runs] for key, runs in grouped(results, share) if key[1] in TRAINED
        }
        if found:
            best = max(found, key=lambda key: fmean(found[key]))
            if fmean(found[best]) >= KEPT:
                return (
                    f"The smallest share with at least {KEPT:.0f}% by a trained router is {share:.0%}: "
                    f"{best[0]}, {best[1]}, {told(found[best])}."
                )
    return f"At no share did a trained router keep {KEPT:.0f}%."


def worse_line(what: str, clusters: Runs | None, random: Runs | None) -> str:
    """Whether random experts are clearly worse than clusters of the same seeds."""
    if not clusters or not random:
        return ""
    gaps = [clusters[seed] - random[seed] for seed in clusters if seed in random]
    if not gaps:
        return ""
    clear = fmean(gaps) > max(POINT, 2 * stdev(gaps) if len(gaps) > 1 else 0.0)
    seeds = ", one seed" if len(gaps) == 1 else " by seed"
    return (
        f"{what} are clearly worse than clusters: {said(clear)} ({figure(random.values())}% beside "
        f"{figure(clusters.values())}%, {figure(gaps, '+')} points{seeds})."
    )


def router_line(values: Mapping[tuple[str, str], Runs]) -> str:
    """What choosing by the MLP router loses to an oracle, by construction."""
    lost = []
    for construction in dict.fromkeys(key[0] for key in values):
        oracle, router = values.get((construction, "oracle")), values.get((construction, "MLP"))
        if oracle and router:
            lost.append(f"{construction} {fmean(oracle.values()) - fmean(router.values()):.1f}")
    return f"To an oracle the MLP router loses, in points: {', '.join(lost)}." if lost else ""


def training_line(values: Mapping[tuple[str, str], Runs]) -> str:
    """What training a router gains over the better training-free one, by construction."""
    gained = []
    for construction in dict.fromkeys(key[0] for key in values):
        free = [values[construction, name] for name in FREE if (construction, name) in values]

        router = values.get((construction, "MLP"))
        if free and router:
            best = max(fmean(each.values()) for each in free)
            gained.append(f"{construction} {fmean(router.values()) - best:+.1f}")
    return (
        f"Over the better of the two routers without training the MLP router gains, in points: "
        f"{', '.join(gained)}."
        if gained
        else ""
    )


def recall_line(results: Results) -> str:
    """Mass and recall under the MLP router, by construction."""
    parts = []
    for (construction, router), runs in grouped(results, HEADLINE):
        if router == "MLP":
            mass, recall = (100 * fmean(run[name] for run in runs) for name in ("mass", "recall"))
            parts.append(f"{construction} {mass:.0f}% ({recall:.0f}%)")
    return f"Captured mass (recall) of the MLP router: {', '.join(parts)}." if parts else ""


def threshold_line(values: Mapping[tuple[str, str], Runs], clusters: Runs | None) -> str:
    """What single neurons by a threshold keep."""
    single = values.get(THRESHOLD)
    if not single or not clusters:
        return ""
    return (
        f"At the same share a training-free threshold on single neurons, which computes the first product "
        f"whole, keeps {told(single.values())}."
    )


def kept(result: Mapping[str, Any]) -> float:
    """Accuracy in % of the dense model's."""
    return 100 * result["accuracy"] / result["dense accuracy"]


def grouped(results: Results, share: float | None = None) -> list[tuple[tuple[str, str], Results]]:
    """Results by construction and router, constructions together; of one share, if given."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for construction in dict.fromkeys(result["construction"] for result in results):
        for result in results:
            if result["construction"] == construction and share in (None, result["share"]):
                groups.setdefault((construction, result["router"]), []).append(result)
    return list(groups.items())


def said(holds: bool) -> str:
    """Whether, in words."""
    return "holds" if holds else "does not hold"


def told(values: Iterable[float]) -> str:
    """Mean ± s.d. in %, or the value and that it is one."""
    found = list(values)
    return f"{figure(found)}%" + (", one seed" if len(found) == 1 else "")


def figure(values: Iterable[float], sign: str = "") -> str:
    """Mean ± s.d., of one value itself."""
    found = list(values)
    return f"{fmean(found):{sign}.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")
