"""The studies of costs: the figures of the list's notes, and the committed pages."""

import re
from pathlib import Path

import pytest

from modicum.experiments.cost_claims import claims_text, findings, grown_compute, grown_sizes
from modicum.experiments.planner_validation import compiler_table, megatron_arithmetic, out_of_memory_table

FOUND = {one.rows: one for one in findings()}


def test_every_row_of_the_list_is_there():
    assert list(FOUND) == [
        "7",
        "8",
        "16",
        "17",
        "20",
        "21",
        "36",
        "37",
        "38-39",
        "40",
        "41",
        "42",
        "43",
        "44",
        "45",
        "46",
        "47",
    ]
    assert all(one.word for one in FOUND.values())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("16", "43.75 GB a card"),
        ("16", "365 days at 50% MFU"),
        ("17", r"\$1.34 an hour"),
        ("43", r"\$6.7 a kWh"),
        ("44", "50% MFU"),
        ("45", "35 words/s"),
        ("47", r"\$9.72 a server-hour"),
        ("40", "50 to 67 times"),
    ],
)
def test_figures_of_the_research_notes(row, expected):
    assert re.search(expected, FOUND[row].figure), FOUND[row].figure


def test_four_cards_are_too_few_for_cpm_bee():
    needed = [int(text) for text in re.findall(r"(\d+)% MFU", FOUND["21"].figure)]
    assert needed[0] > 100


def test_sizes_and_compute_double_within_a_year():
    for months, fit, _ in (grown_sizes(), grown_compute()):
        assert 3 < months < 12 and fit > 0.4


def test_mt_nlg_exactly():
    assert round(100 * megatron_arithmetic(), 2) == 29.77


def test_the_out_of_memory_pattern():
    """Which of BMTrain's 28 cells ran: all agree."""
    table, agreed, cells = out_of_memory_table()
    assert (agreed, cells) == (28, 28), table.markdown()


def test_memory_is_within_a_tenth_of_the_compilers():
    """Six programs of CPM-Ant 10B compiled ahead of time for four v5p (docs/results/delta_memory.md)."""
    table = compiler_table(Path(__file__).resolve().parents[2] / "docs" / "results" / "delta_memory.jsonl")
    errors = [float(row[-1]) for row in table.rows]
    assert len(errors) >= 6
    assert max(map(abs, errors)) < 10, table.markdown()


def test_the_committed_page_of_claims_is_current():
    page = Path(__file__).resolve().parents[2] / "docs" / "results" / "cost_claims.md"
    assert page.read_text(encoding="utf-8") == claims_text()
