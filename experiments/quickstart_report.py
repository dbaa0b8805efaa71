"""The quickstart's page: every figure in it was measured by the run beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..research.study.configs import to_text
from ..research.study.environment import describe_environment
from ..research.study.figures import Axis, Line, bar_plot, line_plot
from ..research.study.report import Card, Report, Section
from ..research.study.runs import write_atomically
from ..research.study.tables import Table, summarise
from .quickstart import LEARNING_RATES, METHODS, Findings

SWEEP_PAGE = "docs/quickstart-sweep.md"
RATIOS = np.linspace(0.0, 1.0, 101)


def write_report(folder: Path, findings: Findings) -> str:
    """Write `report.html` and the tables as CSV; return what to say at the end."""
    tables = {
        "tuning": tuning_table(findings),
        "language_model": language_model_table(findings),
        "sparsity": sparsity_table(findings),
    }
    for name, table in tables.items():
        table.write(folder / "tables", name)
    page = Report(
        title="Modicum quickstart",
        summary=(
            "A small language model trained here on Python's standard library, tuned in five ways to a "
            "real task, and its neurons counted. Every number below was measured in this run."
        ),
        cards=cards(findings),
        sections=[
            language_model_section(findings, tables["language_model"]),
            tuning_section(findings, tables["tuning"]),
            sparsity_section(findings, tables["sparsity"]),
        ],
        next_steps=NEXT_STEPS,
        details={
            "Model": to_text(findings.pretrained.trained.model.config),
            "Size of this run": to_text(findings.size),
            "Environment": "\n".join(f"{name}: {value}" for name, value in describe_environment().items()),
        },
    )
    page.write(folder / "report.html")
    steps = "\n".join(f"  {step}" for step in NEXT_STEPS)
    return f"{tables['tuning'].markdown()}\nreport: {folder / 'report.html'}\nwhat to try next:\n{steps}"


NEXT_STEPS = (
    "modicum train DATA --text-column text --out runs/mine: the same language model on your own text",
    "modicum tune runs/mine --data FOLDER --label-column label lora --rank 4: tune it to your own labels",
    "modicum evaluate runs/mine --data FILE: score it",
    "modicum report runs: one page from any folder of runs",
)


def cards(findings: Findings) -> list[Card]:
    """What a reader takes away."""
    whole = findings.tunings[0]["parameters"]
    accuracy = {name: fmean(of(findings, name, "test_accuracy")) for name in METHODS}
    deltas = {name: value for name, value in accuracy.items() if name not in ("full tuning", "linear probe")}
    best = max(deltas, key=lambda name: deltas[name])
    share = of(findings, best, "trained_parameters")[0] / whole
    trained, fresh = findings.sparsity["trained"], findings.sparsity["untrained"]
    result = findings.pretrained.result
    return [
        Card(
            "Best delta", f"{deltas[best]:.1%}", f"{best}, {share:.2%} of the parameters; mean test accuracy"
        ),
        Card("Full tuning", f"{accuracy['full tuning']:.1%}", "mean test accuracy"),
        Card(
            "Neurons that fire",
            f"{trained.active_ratio:.1%}",
            f"for a token; {fresh.active_ratio:.1%} untrained",
        ),
        Card(
            "Language model",
            f"{result['loss']:.2f} nats",
            f"a token; a bigram model: {result['bigram_loss']:.2f}",
        ),
    ]


def language_model_table(findings: Findings) -> Table:
    """The language model and what simpler models score on the same held-out tokens."""
    result, vocab = findings.pretrained.result, findings.pretrained.tokenizer.vocab
    losses = {
        "decoder trained here": result["loss"],
        "bigram model": result["bigram_loss"],
        "uniform": math.log(vocab),
    }
    rows = tuple((name, loss, math.exp(loss)) for name, loss in losses.items())
    return Table(("model", "loss (nats a token)", "perplexity"), rows, "Held-out modules of the library.")


def language_model_section(findings: Findings, table: Table) -> Section:
    """How far pretraining came."""
    result = findings.pretrained.result
    steps, losses = zip(*findings.pretrained.losses)
    passes = result["tokens_seen"] / result["train_tokens"]
    figure = line_plot(
        "Held-out loss during training",
        Axis("step"),
        Axis("nats a token"),
        [
            Line("decoder", steps, [losses]),
            Line("bigram model", steps, [[result["bigram_loss"]] * len(steps)]),
        ],
    )
    prose = (
        f"A ReLU decoder of {findings.tunings[0]['parameters']:,} parameters (its classifier included) read "
        f"{result['tokens_seen']:,} tokens, {passes:.2f} passes over the training modules. The tokenizer was "
        f"trained on the same modules; modules of the dev and test splits were never seen."
    )
    return Section("The language model", [prose], [table], [figure])


def tuning_table(findings: Findings) -> Table:
    """A row a method, mean ± standard deviation over seeds, and the baselines."""
    results = [
        {
            "method": result["method"],
            "rate": result["learning rate"],
            "trained": result["trained_parameters"],
            "share": f"{result['trained_parameters'] / result['parameters']:.2%}",
            "test (%)": 100 * result["test_accuracy"],
            "stored (kB)": result["stored_bytes"] / 1e3,
            "memory (MB)": None if result["memory_total"] is None else result["memory_total"] / 1e6,
        }
        for result in findings.tunings
    ]
    counts = findings.counts
    caption = (
        f"Accuracy on {counts['test']:,} test snippets ({counts['train']:,} to train, {counts['dev']:,} to "
        f"choose the step by). Stored: what the task needs beside the language model. Memory: the compiled "
        f"train step, by XLA's account."
    )
    by = ("method", "rate", "trained", "share", "stored (kB)", "memory (MB)")
    table = summarise([{**r, **_rounded(r)} for r in results], by, ("test (%)",), caption)
    blank = (None,) * (len(by) - 1)
    baselines = tuple((name, *blank, 100 * accuracy, None) for name, accuracy in findings.baselines.items())
    return Table(table.columns, (*table.rows, *baselines), caption)


def _rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes to three digits: they are the same for every seed."""
    return {
        name: None if result[name] is None else float(f"{result[name]:.3g}")
        for name in ("stored (kB)", "memory (MB)")
    }


def tuning_section(findings: Findings, table: Table) -> Section:
    """Accuracy against the trained share."""
    seeds = len(findings.size.seeds)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    baselines = {name: 100 * accuracy for name, accuracy in findings.baselines.items()}
    figure = bar_plot(
        "Test accuracy",
        Axis("%"),
        {name: [100 * value for value in of(findings, name, "test_accuracy")] for name in METHODS},
        baselines,
    )
    memory = bar_plot(
        "Memory of a train step",
        Axis("MB"),
        {name: [value / 1e6 for value in of(findings, name, "memory_total")[:1]] for name in METHODS},
    )
    prose = (
        "The task: which of eight parts of the library does a snippet come from? Imports are left out and "
        f"module names masked; test modules are held out. Means ± standard deviations over {seeds} seeds, "
        "at the best step by the dev split.",
        f"Learning rates come from a sweep on the dev split with one seed, kept in {SWEEP_PAGE}: {rates}.",
        f"Baselines: the majority class, and naive Bayes on the same tokens. Naive Bayes counts all "
        f"{findings.counts['train']:,} training snippets; a tuned model has seen "
        f"{findings.size.tuning_steps * findings.size.tuning_batch:,} by its last step.",
    )
    return Section("Tuning a small part", prose, [table], [figure, memory])


def sparsity_table(findings: Findings) -> Table:
    """A row a layer of the trained model."""
    rows = tuple(
        (
            layer["layer"].split("/")[0].replace("layers_", "layer "),
            layer["neurons"],
            f"{layer['active']:.1%}",
            f"{layer['inputs below 5%']:.1%}",
            layer["dead"],
            layer["always on"],
            f"{layer['ever active']:.1%}",
        )
        for layer in findings.sparsity["trained"].rows()
    )
    columns = ("layer", "neurons", "active", "tokens below 5%", "dead", "always on", "ever active")
    tokens = findings.sparsity["trained"].layers[0].tokens
    return Table(columns, rows, f"The trained model on {tokens:,} held-out tokens.")


def sparsity_section(findings: Findings, table: Table) -> Section:
    """Which neurons fire."""
    trained, fresh = findings.sparsity["trained"], findings.sparsity["untrained"]
    figure = line_plot(
        "Tokens that activate at most a share of the neurons",
        Axis("share of a layer's neurons"),
        Axis("share of tokens"),
        [
            Line(name, RATIOS.tolist(), [statistics.cumulative(RATIOS).tolist()])
            for name, statistics in findings.sparsity.items()
        ],
    )
    prose = (
        f"A neuron is active where its ReLU gives more than 0. Over held-out tokens and layers "
        f"{trained.active_ratio:.1%} are, against {fresh.active_ratio:.1%} before training; "
        f"{trained.dead} neurons never fire, {trained.ever_active:.1%} fire for some token, and "
        f"{trained.fraction_of_inputs_below(0.05):.1%} of tokens activate less than 5% of a layer's neurons. "
        f"(The claim for T5-Large, which is not measured here, is 80% of inputs.)"
    )
    return Section("Which neurons fire", [prose], [table], [figure])


def of(findings: Findings, method: str, field: str) -> list[float]:
    """A field of one method's runs, a value a seed."""
    return [result[field] for result in findings.tunings if result["method"] == method]


def write_sweep(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write the sweep's table and return it."""
    rates = sorted({result["learning rate"] for result in results})
    accuracy = {(r["method"], r["learning rate"]): 100 * r["dev_accuracy"] for r in results}
    rows = tuple((name, *(accuracy.get((name, rate)) for rate in rates)) for name in METHODS)
    caption = "Dev accuracy (%) at each learning rate, seed 0."
    table = Table(("method", *(f"{rate:g}" for rate in rates)), rows, caption)
    text = (
        f"# Learning rates of the quickstart\n\n{caption} `modicum quickstart --sweep`.\n\n{table.markdown()}"
    )
    write_atomically(folder / "sweep.md", text)
    return f"{text}\nwritten to {folder / 'sweep.md'}"
