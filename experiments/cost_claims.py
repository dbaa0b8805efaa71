"""Study: the talks' figures of cost, each recomputed: consistent or not, and under which batch or
utilisation.

Claim: those of the list's rows 7-8, 16-17, 20-21, 36-47.
Command: modicum study cost-claims --markdown docs/results/cost_claims.md
Cost: seconds, no device.
Expected: docs/results/cost_claims.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..parallel.plan import CHIPS, Chip
from ..research.planning.serving import Serving
from ..research.planning.training import DAY, HOUR, training_days, training_flops
from ..research.study.tables import Cell, Table

GPT3, GPT3_TOKENS = 175e9, 300e9
ANT, BEE = 9_391_624_192, 9_616_080_896  # tests/models/test_parameter_counts.py
BYTES_PER_TOKEN = 5  # of Chinese text; research/openbmb.md assumes it for CPM-Ant's log
WORDS_PER_TOKEN = 0.75
A100: Chip = CHIPS["a100-80"]
PEAK = A100.peak["bfloat16"]
# Name, year, parameters, tokens (None: not read). Years are remembered; sizes are those of docs/claims.md 56,
# models/presets.py and research/apps.md 5.2.
MODELS = (
    ("Transformer (big)", 2017, 214.2e6, None),
    ("GPT-1", 2018, 117e6, None),
    ("GPT-2", 2019, 1.558e9, None),
    ("GPT-3", 2020, 174.6e9, 300e9),
    ("Gopher", 2021, 280e9, 300e9),
    ("MT-NLG", 2021, 530e9, None),
    ("PaLM", 2022, 540.35e9, 780e9),
    ("BLOOM", 2022, 176.247e9, 366e9),
    ("LLaMA 65B", 2023, 65.2e9, 1.4e12),
    ("Llama 2 70B", 2023, 68.98e9, 2e12),
    ("Llama 3.1 405B", 2024, 405.85e9, 15.6e12),
)
LAST_YEAR = 2022  # of row 36


@dataclass(frozen=True)
class Finding:
    """One row: the claim's numbers in the list, what was computed, and a word of docs/claims.md."""

    rows: str
    claim: str
    figure: str
    word: str


def gpt3_server(servers: float = 1) -> Serving:
    """GPT-3 in 16 bits on servers of eight A100-80GB, at the bound; 4.72 MB of cache a token."""
    return Serving(GPT3, 2, 2 * 96 * 12_288 * 2, A100, round(8 * servers))


def grown_sizes() -> tuple[float, float, int]:
    """Months in which sizes double up to 2022, R² of the log fit, number of models."""
    return log_fit([(year, size) for _, year, size, _ in MODELS if year <= LAST_YEAR])


def grown_compute() -> tuple[float, float, int]:
    """The same of 6 N D, for the models whose tokens were read."""
    return log_fit([(year, training_flops(size, tokens)) for _, year, size, tokens in MODELS if tokens])


def log_fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, int]:
    """Least squares of log2 over years: months of a doubling, R², number of points."""
    years, logs = np.array([year for year, _ in points], float), np.log2([value for _, value in points])
    slope, intercept = np.polyfit(years, logs, 1)
    left = np.sum((logs - slope * years - intercept) ** 2) / np.sum((logs - logs.mean()) ** 2)
    return float(12 / slope), float(1 - left), len(points)


def growth() -> list[Finding]:
    """Rows 7 and 36."""
    months, fit, count = grown_sizes()
    compute_months, compute_fit, known = grown_compute()
    return [
        Finding(
            "7",
            "data and parameters make compute grow exponentially",
            f"6 N D of {known} models, 2020 to 2024 (years remembered): doubling every "
            f"{compute_months:.1f} months, R² {compute_fit:.2f}",
            "not shown by these seven models: so weak a fit of seven points is not significant",
        ),
        Finding(
            "36",
            "model sizes grow exponentially 2017-2022",
            f"log fit over {count} models (years remembered): doubling every {months:.1f} months, R² "
            f"{fit:.2f}",
            "holds of the largest published models",
        ),
    ]


def latency() -> Finding:
    """Row 8."""
    server, words = gpt3_server(), 50
    bound = words / WORDS_PER_TOKEN * server.step_seconds(1, 200)
    palm = Serving(540.35e9, 2, 2 * 118 * 256 * 2, CHIPS["v4"], 64)
    palm_seconds = words / WORDS_PER_TOKEN * palm.step_seconds(1, 200)
    return Finding(
        "8",
        "GPT-3 and PaLM take seconds where a search engine takes fractions",
        f"{words} words, one stream: GPT-3 on 8 A100 at least {bound:.1f} s ({bound / 0.57:.1f} to "
        f"{bound / 0.43:.1f} s at the 43-57% of the bandwidth that row 45 implies); "
        f"PaLM 540B on 64 v4 at least {palm_seconds:.1f} s",
        f"holds for GPT-3 at row 45's speed; PaLM's bound alone is {palm_seconds:.1f} s",
    )


def gpt3_on_64() -> list[Finding]:
    """Rows 16 and 17."""
    states, fourteen, twelve = (size * GPT3 / 64 / 1e9 for size in (16, 14, 12))
    days = {share: training_days(GPT3, GPT3_TOKENS, 64, PEAK, share) for share in (0.3, 0.4, 0.5)}
    hours = {share: count * 24 * 64 for share, count in days.items()}
    return [
        Finding(
            "16",
            "GPT-3 trains on 64 A100",
            f"states of 16 bytes a parameter: {states:.2f} GB a card, activations beside: fits cards of 80 "
            f"GB, not of 40 (14 bytes: {fourteen:.1f} GB, 12: {twelve:.1f}); "
            f"300e9 tokens take {days[0.5]:.0f} days at 50% MFU, {days[0.3]:.0f} at 30%",
            "holds for memory on 80 GB cards; on 40 GB not at 14 to 16 bytes a parameter without the host's "
            "memory; takes a year and more",
        ),
        Finding(
            "17",
            "cost down >90%, $12M to $750k",
            f"{hours[0.5]:,.0f} card-hours at 50% MFU: $750k is ${750e3 / hours[0.5]:.2f} an hour "
            f"({hours[0.3]:,.0f} and ${750e3 / hours[0.3]:.2f} at 30%); $12M is ${12e6 / hours[0.5]:.2f}; "
            f"list price ${A100.price}: ${hours[0.5] * (A100.price or 0) / 1e6:.2f}M",
            f"the ratio holds ({1 - 750e3 / 12e6:.1%}); $750k holds only at 50% MFU and $1.34 an hour, "
            f"39% of a list price; $12M would be six times that price",
        ),
    ]


def cpm(row: str, name: str, parameters: float, days: int, gigabytes: int, yuan: int) -> Finding:
    """Rows 20 and 21: what 4 A100 would have to do, and 32."""
    tokens = gigabytes * 1e9 / BYTES_PER_TOKEN
    share = {cards: training_flops(parameters, tokens) / (days * DAY * cards * PEAK) for cards in (4, 32)}
    hours = {cards: days * 24 * cards for cards in (4, 32)}
    return Finding(
        row,
        f"{name}: {days} days, 4xA100, {gigabytes}+ GB, ¥{yuan // 1000}k",
        f"{tokens / 1e9:.0f}e9 tokens at {BYTES_PER_TOKEN} bytes: 4 cards would need {share[4]:.0%} MFU, "
        f"32 cards {share[32]:.0%}; "
        f"¥{yuan / hours[4]:.0f} a card-hour with 4, ¥{yuan / hours[32]:.1f} with 32",
        "inconsistent as printed with 4 cards; consistent with 4 machines of 8",
    )


def chatglm() -> Finding:
    """Row 37."""
    width, hidden, layers, vocab = 12_288, 32_768, 70, 150_528
    count = layers * (4 * width**2 + 3 * width * hidden) + vocab * width
    return Finding(
        "37",
        "ChatGLM: 28 layers 6B, 70 layers 130B, the printed modules",
        f"28 layers: 6,173,286,400 (counted from shapes, docs/claims.md); 70 layers with GLM-130B's widths "
        f"(remembered: 12288, gated mlp of 32768): {count / 1e9:.1f}e9",
        "holds for 6B; 130B cannot be checked here: its widths are remembered, and under them it holds",
    )


def demand() -> list[Finding]:
    """Rows 38 to 40 and 46."""
    server, each = gpt3_server(), 300e6 / 60 / 5000
    tokens = each / WORDS_PER_TOKEN
    batch = next(rows for rows in range(1, 4096) if server.tokens_per_second(rows, 1000) >= tokens)
    most = server.largest_batch(1000)
    share = tokens / server.tokens_per_second(most, 1000)
    filled = server.memory(most, 1000) / (server.chips * A100.memory)
    return [
        Finding(
            "38-39",
            "3M words/min for 1M users, 300M for 100M",
            "3 words a minute and user in both",
            "holds (arithmetic)",
        ),
        Finding(
            "40",
            "5000 servers suffice for 300M words/min",
            f"{each:.0f} words/s a server of 8 A100-80GB, {tokens:.0f} tokens/s: {each / 20:.0f} to "
            f"{each / 15:.0f} "
            f"times row 45's one stream; batch {batch} at 1000 tokens of context reaches it at 100% of "
            f"bandwidth "
            f"({server.step_seconds(batch, 1000) * 1e3:.0f} ms a step), the largest that fits, {most} "
            f"({filled:.1%} of the memory), at {share:.0%} of the bandwidth bound",
            "holds only batched, and within a quarter of the bandwidth bound",
        ),
        Finding("46", "$1B of servers", "5000 x $200k = $1.0B", "holds (arithmetic, with rows 40 and 42)"),
    ]


def machines() -> list[Finding]:
    """Rows 41 to 44."""
    per_day, rent = 48 * 6.5 * 24, 50e3 / 24 / 384
    share = training_flops(GPT3, GPT3_TOKENS) / (384 * PEAK * 61 * DAY)
    slow = training_days(GPT3, GPT3_TOKENS, 384, PEAK, 0.318)
    return [
        Finding(
            "41",
            "384 A100-80GB hold 175B training",
            f"{16 * GPT3 / 384 / 1e9:.1f} GB of states a card of 80",
            "holds",
        ),
        Finding("42", "48 DGX x $200k = $9.6M", f"${48 * 200e3 / 1e6:.1f}M, 384 cards", "holds (arithmetic)"),
        Finding(
            "43",
            "one training $3M of electricity, $50k a day for two months",
            f"48 DGX of 6.5 kW: {per_day / 1000:.1f} MWh a day, so $50k is ${50e3 / per_day:.1f} a kWh, or "
            f"${rent:.2f} a card-hour",
            f"does not hold as electricity; looks like rental ({rent / (A100.price or 1):.1f} times the list "
            f"price)",
        ),
        Finding(
            "44",
            "two months on 384 A100",
            f"300e9 tokens in 61 days: {share:.0%} MFU; at BLOOM's whole-run 31.8% {slow:.0f} days",
            "holds at 50% MFU, the best hours of such runs and not their average",
        ),
    ]


def serving_price() -> list[Finding]:
    """Rows 45 and 47."""
    server = gpt3_server()
    bound = server.tokens_per_second(1, 0) * WORDS_PER_TOKEN
    a_million = 2.7 * 1000 * HOUR / 1e6
    single = 8 * 3.0 / (17.5 * HOUR) * 1e6
    return [
        Finding(
            "45",
            "8 A100: 15-20 words/s",
            f"one stream's bound is {bound:.0f} words/s: {15 / bound:.0%} to {20 / bound:.0%} of the "
            f"bandwidth",
            "holds for a single stream",
        ),
        Finding(
            "47",
            "$2.7 per million words",
            f"at row 40's 1000 words/s ${a_million:.2f} a server-hour (${a_million / 8:.2f} a card-hour); "
            f"at row 45's 17.5 words/s and $24 an hour "
            f"${single:.0f}",
            "holds with row 40's batching and cards at cost; inconsistent with row 45",
        ),
    ]


def findings() -> list[Finding]:
    """All rows in the order of the list."""
    ant, bee = cpm("20", "CPM-Ant", ANT, 68, 600, 430_000), cpm("21", "CPM-Bee", BEE, 94, 2000, 470_000)
    found = [
        *growth(),
        latency(),
        *gpt3_on_64(),
        ant,
        bee,
        chatglm(),
        *demand(),
        *machines(),
        *serving_price(),
    ]
    return sorted(found, key=lambda one: int(one.rows.split("-")[0]))


def claims_text() -> str:
    """The study as Markdown."""
    rows: list[tuple[Cell, ...]] = [(one.rows, one.claim, one.figure, one.word) for one in findings()]
    table = Table(("#", "claim", "recomputed", "word"), tuple(rows))
    return f"""# The talks' figures of cost, recomputed

`modicum study cost-claims --markdown docs/results/cost_claims.md` makes this page: arithmetic with
`modicum.research.planning` and the data sheets of `parallel/plan/chips.py`. Training is 6 N D operations;
serving is the bound of docs/plan.md; a token is {WORDS_PER_TOKEN} words. Numbers are those of the list in
which the claims were collected.

{table.markdown()}"""


def write_claims(markdown: Path | None) -> str:
    """The page's text, also written to `markdown` where one is given."""
    text = claims_text()
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
    return text
