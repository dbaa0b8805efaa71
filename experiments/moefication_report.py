"""The tables, figures and page of the study of MoEfication."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..research.study.figures import Axis, Line, heat_map, line_plot
from ..research.study.runs import write_atomically
from ..research.study.tables import Cell, Measured, Table
from .moefication import SIZES, Size, used
from .moefication_costs import CONSTRUCTION, ROUNDS, TOKENS
from .moefication_subjects import Recipe
from .moefication_verdicts import Results, grouped, kept, verdicts
from .moefication_work import HEADLINE, THRESHOLD

Value = Callable[[Mapping[str, Any]], float]


def write_moefication(folder: Path, results: Results, times: Results, size: Size, page: Path | None) -> str:
    """Write tables and figures under `folder`, into `page` too with figures beside it; return the tables."""
    parts: dict[str, str] = {}
    drawn: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(result["subject"] for result in results):
        mine, own = used(results, subject=name), used(times, subject=name)
        tables = {
            "quality": quality_table(mine),
            "loss": loss_table(mine),
            "mass": mass_table(mine),
            "costs": cost_table(mine, own),
        }
        for label, table in tables.items():
            table.write(folder / "tables", f"{_file(name)}-{label}")
        drawn[name] = figures(name, mine, own)
        shown = "\n".join(f"{table.caption}\n\n{table.markdown()}" for table in tables.values())
        parts[name] = f"## {name}\n\n{described(mine)}\n\n{shown}\n{verdicts(mine)}"
    for name, pictures in drawn.items():
        for label, svg in pictures.items():
            write_atomically(folder / "figures" / f"{_file(name)}-{label}.svg", svg)
    if page is not None:
        write_page(page, parts, drawn, results, size)
    return "\n".join(parts.values())


def write_page(
    page: Path,
    parts: Mapping[str, str],
    drawn: Mapping[str, Mapping[str, str]],
    results: Results,
    size: Size,
) -> None:
    """What was asked, then each model's tables and figures, which lie in a folder of the page's name."""
    beside, shown = page.with_suffix(""), [introduction(results, size)]
    for name, text in parts.items():
        links = []
        for label, svg in drawn[name].items():
            file = f"{_file(name)}-{label}.svg"
            write_atomically(beside / file, svg)
            links.append(f"![{name}, {label}]({beside.name}/{file})\n")
        shown.append("\n".join([text, *links]))
    write_atomically(page, "\n".join(shown))


def introduction(results: Results, size: Size) -> str:
    """What was asked, by which command, and how much of it there is."""
    seeds = sorted({one["seed"] for one in results})
    cells = {(one["subject"], one["construction"], one["router"], one["seed"]) for one in results}
    count = ", ".join(f"{sum(cell[3] == seed for cell in cells)} of seed {seed}" for seed in seeds)
    return (
        "# MoEfication: what is left with a tenth to a half of the neurons\n\n"
        f"`experiments/moefication.py`: dense ReLU models cut into experts of {size.neurons} neurons in four "
        f"ways, of which five routers choose some for each token. Experts and routers are made from "
        f"{size.tokens:,} training tokens ({size.epochs} epochs); captured mass is measured on an eighth as "
        f"many that were held out, quality on test rows that nothing was chosen on. "
        f"{models(results, size.recipe)} This page has {len(cells)} cells: {count}; what draws nothing "
        "(contiguous experts under routers without training, thresholds) has one seed. 'Clearly' worse is by "
        "more than a point, and by more than two s.d. of the seeds' gaps where there are several.\n\n"
        f"    modicum study moefication{asked(size)} --times --markdown docs/results/moefication.md\n\n"
        "runs what is left, times layers (wants a quiet machine) and writes this page; with `--finished` it "
        "writes it from what is there.\n"
    )


def models(results: Results, recipe: Recipe) -> str:
    """How the models that have cells were made."""
    names, said = {one["subject"] for one in results}, []
    if names & {"decoder", "sparse decoder"}:
        price = f", the sparse one with a price of {recipe.price:g} on the mean activation"
        said.append(
            f"Decoders are trained for {recipe.steps} steps of {recipe.batch}×128 tokens of WikiText-2's "
            f"valid split and Tiny Shakespeare and measured on what these hold out (next-token accuracy)"
            f"{price if 'sparse decoder' in names else ''}."
        )
    if names - {"decoder", "sparse decoder"}:
        one = next(each for each in results if each["subject"] not in ("decoder", "sparse decoder"))
        accuracy, rows = one["dense accuracy"], one["dense rows"]
        error = 100 * (accuracy * (1 - accuracy) / rows) ** 0.5
        said.append(
            f"MiniLM-L6 is given ReLU and tuned for {recipe.tuning_steps} steps of {recipe.tuning_batch} "
            f"rows of sst2, whose {rows} test rows give an accuracy a standard error of {error:.1f} points: "
            f"losses tell more."
        )
    return " ".join(said)


def asked(size: Size) -> str:
    """The options of the command that runs this size."""
    names = [name for name, each in SIZES.items() if replace(each, seeds=size.seeds) == size]
    own = f" --size {names[0]}" if names and names[0] != "full" else ""
    seeds = f" --seeds {len(size.seeds)}" if names and size.seeds != SIZES[names[0]].seeds else ""
    return own + seeds


def described(results: Results) -> str:
    """The dense model: sizes, quality, how active its neurons are."""
    one = results[0]
    shares = [next(r["used"] for r in results if r["share"] == share) for share in _shares(results)]
    taken = " / ".join(f"{100 * share:.1f}" for share in shares)
    made = "; ".join(f"{what} {100 * value:.1f}%" for what, value in one["made"].items() if " " in what)
    return (
        f"{one['dense layers']} layers, D={one['dense width']}, F={one['dense neurons']}, "
        f"{one['dense parameters']:,} parameters. On {one['dense rows']} test rows the dense model's "
        f"accuracy is {100 * one['dense accuracy']:.1f}%, its loss {one['dense loss']:.3f} nats"
        f"{f' (after training, {made})' if made else ''}. "
        f"{100 * one['dense active']:.1f}% of its neurons are active on the mean token, and the "
        f"{HEADLINE:.0%} that are largest hold {100 * one['dense largest']:.1f}% of a token's mass. Whole "
        f"experts make the columns of {' / '.join(_heads(_shares(results)))} into {taken}%."
    )


def quality_table(results: Results) -> Table:
    """A row a construction and router: accuracy in % of the dense model's at each share."""
    spread = "mean ± s.d. over seeds" if len({one["seed"] for one in results}) > 1 else "one seed"
    caption = f"Accuracy in % of the dense ReLU model's, {spread}, by the share of neurons."
    return _by_share(results, caption, kept)


def loss_table(results: Results) -> Table:
    """A row a construction and router: what the loss gains, in nats."""
    caption = "Loss above the dense model's, in nats."
    return _by_share(results, caption, lambda one: round(one["loss"] - one["dense loss"], 4))


def mass_table(results: Results) -> Table:
    """A row a construction and router: the share of the activation mass that is captured at each share."""
    caption = (
        "Captured activation mass in %, mean over layers and seeds, and in brackets recall: how many of the "
        "truly most massive experts were chosen."
    )
    shares = _shares(results)
    rows = []
    for (construction, router), runs in grouped(results):
        cells = [
            f"{100 * fmean(r['mass'] for r in at):.1f} ({100 * fmean(r['recall'] for r in at):.0f})"
            for share in shares
            if (at := [run for run in runs if run["share"] == share and "mass" in run])
        ]
        if cells:
            rows.append((construction, router, *cells))
    return Table(("experts", "router", *_heads(shares)), tuple(rows), caption)


def cost_table(results: Results, times: Results) -> Table:
    """A row a router: multiplications of the feed-forward layers beside the dense ones', and time."""
    shares, rows = _shares(results), []
    for router in dict.fromkeys(one["router"] for one in results):
        cells: list[Cell] = []
        for share in shares:
            products = next(r["products"] for r in used(results, router=router, share=share))
            took = [f"{t['faster'][0]:.1f}×" for t in used(times, router=router, share=share)]
            cells.append(" / ".join([f"{100 * products:.1f}", *took]))
        rows.append((router, *cells))
    caption = (
        "Multiplications of the feed-forward layers in % of the dense ones', router included; the oracle and "
        "thresholds compute the first product whole, and where fewer neurons are active than the share says "
        "a threshold cuts none."
    )
    if times:
        dense = fmean(one["dense ms"] for one in times)
        caption += (
            f" After the stroke, how many times faster the layers ({CONSTRUCTION}) are for one token than "
            f"the dense ones, which take {dense:.2f} ms: median of {ROUNDS} turns in which all are timed, "
            f"{TOKENS} tokens one after another; float32 on this machine's CPU, load {times[0]['load']:g} "
            f"(what this process did just before is part of it)."
        )
    return Table(("router", *_heads(shares)), tuple(rows), caption)


def figures(name: str, results: Results, times: Results) -> dict[str, str]:
    """Quality against cost, by construction and by router, and against time; mass by share and by layer."""
    cost, quality = Axis("multiplications, share of the dense layers'"), Axis("accuracy, % of dense")
    mlp, clusters = used(results, router="MLP"), [*used(results, construction=CONSTRUCTION)]
    single = used(results, construction=THRESHOLD[0])
    mass = Axis("captured mass, share")
    wanted = {
        "constructions": ("experts by the MLP router", cost, quality, lines(mlp, "construction", kept)),
        "routers": ("routers on clusters", cost, quality, lines([*clusters, *single], "router", kept)),
        "mass": (
            "captured mass, MLP router",
            Axis("share of neurons used"),
            mass,
            lines(mlp, "construction", lambda one: one["mass"], lambda one: one["used"]),
        ),
        "time": (
            "routers on clusters, by time",
            Axis("time of the feed-forward layers, share of the dense ones'"),
            quality,
            timed(clusters, times),
        ),
    }
    drawn = {
        label: line_plot(f"{name}: {title}", x, y, series)
        for label, (title, x, y, series) in wanted.items()
        if series
    }
    return drawn | by_layer(name, used(mlp, share=HEADLINE))


def lines(results: Results, of: str, value: Value, cost: Value = lambda one: one["products"]) -> list[Line]:
    """A line for each value of the field `of`, a point for each share."""
    found = []
    for label in dict.fromkeys(one[of] for one in results):
        mine, shares = used(results, **{of: label}), _shares(results)
        by_seed = [
            [value(next(iter(used(mine, seed=seed, share=share)))) for share in shares]
            for seed in dict.fromkeys(one["seed"] for one in mine)
        ]
        places = [cost(next(iter(used(mine, share=share)))) for share in shares]
        found.append(Line(label, places, by_seed))
    return found


def by_layer(name: str, results: Results) -> dict[str, str]:
    """Captured mass of each layer by construction, where there are several layers."""
    means = []
    for construction in dict.fromkeys(one["construction"] for one in results):
        runs = [one["mass by layer"] for one in used(results, construction=construction)]
        means.append([fmean(values) for values in zip(*runs, strict=True)])
    if not means or len(means[0]) < 2:
        return {}
    title = f"{name}: captured mass at {HEADLINE:.0%} of the neurons, MLP router"
    rows, columns = dict.fromkeys(one["construction"] for one in results), map(str, range(len(means[0])))
    axes = Axis("layer"), Axis("experts")
    return {"layers": heat_map(title, means, list(rows), list(columns), *axes, "captured mass, share")}


def timed(results: Results, times: Results) -> list[Line]:
    """Quality over measured time, a line for each router that saves any."""
    took = {(one["router"], one["share"]): 1 / one["faster"][0] for one in times}
    found = [one for one in results if (one["router"], one["share"]) in took]
    return lines(found, "router", kept, lambda one: took[one["router"], one["share"]]) if found else []


def _by_share(results: Results, caption: str, value: Value) -> Table:
    shares = _shares(results)
    rows: list[tuple[Cell, ...]] = []
    for (construction, router), runs in grouped(results):
        found = [[value(run) for run in runs if run["share"] == share] for share in shares]
        rows.append((construction, router, *(Measured.of(each) if each else None for each in found)))
    return Table(("experts", "router", *_heads(shares)), tuple(rows), caption)


def _heads(shares: list[float]) -> list[str]:
    return [f"{share:.0%}" for share in shares]


def _shares(results: Results) -> list[float]:
    return sorted({result["share"] for result in results})


def _file(name: str) -> str:
    return name.replace(" ", "-")
