"""Tables, figures and pages: what people read."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from modicum import InputError
from modicum.research.study import sweeps
from modicum.research.study.collect import collect, differing, report_from_runs, result_tables
from modicum.research.study.figures import Axis, Line, bar_plot, cdf_plot, heat_map, line_plot
from modicum.research.study.report import Card, Report, Section
from modicum.research.study.runs import Run
from modicum.research.study.study import run_study, write_tables
from modicum.research.study.tables import Table, summarise

X, Y = Axis("step"), Axis("loss (nats)")
FIGURES = {
    "line": lambda title: line_plot(title, X, Y, [Line("<a> & b", [1, 2], [[3, 2], [4, 1]])]),
    "bar": lambda title: bar_plot(title, Y, {"a": [1, 2], "b": [3]}, {"chance": 0.5}),
    "cdf": lambda title: cdf_plot(title, X, {"a": [3, 1, 2]}),
    "heat": lambda title: heat_map(title, [[1.0, 2.0]], ["r"], ["c", "d"], X, Y, "%"),
}


@dataclass(frozen=True)
class Study:
    method: str = "lora"
    rate: float = 0.1
    seed: int = 0


def test_means_and_sample_deviations_over_seeds():
    rows = [{"method": "a", "x": 1.0}, {"method": "a", "x": 3.0}, {"method": "b", "x": 5.0}]
    table = summarise(rows, ["method"], ["x"])
    (_, measured, count), (_, single, _) = table.rows
    assert (measured.mean, measured.deviation, count) == (2.0, pytest.approx(2**0.5), 2)
    assert single.mean == 5.0 and single.deviation is None
    assert "2.0 ± 1.4" in table.markdown()
    assert table.csv().splitlines()[0] == "method,x mean,x sd,x n,runs"


def test_a_missing_cell_is_a_dash_and_an_incomplete_one_says_so():
    table = summarise([{"m": "a", "x": 1.0}, {"m": "a"}, {"m": "b"}], ["m"], ["x"])
    assert table.formatted()[0][1] == "1 (n=1)" and table.formatted()[1][1] == "–"


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_are_svg_with_escaped_text(kind):
    svg = FIGURES[kind]("Loss <of> & all")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "<of>" not in svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)


def test_logarithmic_axes_have_numbers_and_no_tex():
    svg = line_plot("Log", Axis("n", log=True), Axis("loss", log=True), [Line("a", [0.1, 1000], [[2, 5]])])
    assert "math" not in svg and all(f">{label}</text>" in svg for label in ("0.1", "1000", "3"))


def test_an_empty_figure_is_an_error():
    with pytest.raises(InputError, match="Nothing"):
        line_plot("Nothing", X, Y, [])


class Page(HTMLParser):
    """Collects what a page would load, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]


def test_the_page_loads_nothing_and_escapes_text():
    figures = [make(kind) for kind, make in FIGURES.items()]
    table = Table(("<b>name</b>", "value"), (("a & b", 1.5),))
    report = Report(
        "A <script>alert(1)</script> title",
        "One sentence.",
        [Card("accuracy", "90%", "of tests")],
        [Section("First", ["Prose <i>here</i>."], [table], figures)],
        ["modicum report runs"],
        {"Environment": "jax: 1 < 2"},
    )
    text = report.html()
    page = Page(text)
    assert page.loaded == [] and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("svg") == 4 and page.tags.count("table") == 1 and "details" in page.tags
    assert "&lt;b&gt;name&lt;/b&gt;" in text and "<i>here</i>" not in text
    assert "url(http" not in text and "@import" not in text


def test_a_figure_has_to_be_svg():
    with pytest.raises(InputError, match="svg"):
        Report("t", sections=[Section("s", figures=["<script>"])]).html()


def finished_runs(root):
    for method in ("lora", "adapter"):
        for seed in (0, 1):
            run = Run.open(root, Study(method), seed=seed)
            with run.metrics() as log:
                log.append(1, {"loss": 1.0})
                log.append(2, {"loss": 0.5, "evaluation_loss": 0.6})
            run.finish({"accuracy": 0.5 + seed / 10, "name": method})


def test_any_folder_of_runs_becomes_a_page(tmp_path):
    finished_runs(tmp_path / "deep")
    runs = collect(tmp_path)
    assert len(runs) == 4 and differing(runs) == ["config.method"]
    (table,) = result_tables(runs)
    assert table.columns == ("method", "accuracy", "runs") and len(table.rows) == 2
    assert table.rows[0][1].mean == pytest.approx(0.55)
    page = Page(report_from_runs(tmp_path).html())
    assert page.tags.count("svg") == 2 and page.loaded == []


def test_no_runs_are_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        collect(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        collect(tmp_path / "nowhere")


def test_a_study_skips_what_is_finished_and_reports_what_failed(tmp_path):
    ran = []

    def cell(config, run):
        ran.append((config.method, config.seed))
        if config.method == "broken":
            raise InputError("no such method")
        return {"accuracy": config.rate + config.seed}

    sweep = sweeps.grid(method=["lora", "broken"], seed=[0, 1])
    for _ in range(2):
        with pytest.raises(InputError, match=r"2 of 4 cells failed; .*no such method"):
            run_study(tmp_path, Study(), sweep, cell)
    assert ran.count(("lora", 0)) == 1 and ran.count(("broken", 0)) == 2
    results = run_study(tmp_path, Study(), sweeps.grid(method=["lora"], seed=[0, 1]), cell)
    table = write_tables(tmp_path, "accuracy", results, ["method"], ["accuracy"])
    assert table.rows[0][1].mean == pytest.approx(0.6)
    assert (tmp_path / "accuracy.md").exists() and (tmp_path / "accuracy.csv").exists()


def test_stressed_words_of_a_caption_are_markdown_in_tables_and_italics_on_a_page():
    table = Table(("a <b>",), ((1,),), "*Held out*: rows & 2 * 3 < 7; *by chance* about it.")
    html = Report("Title", sections=[Section("One", (), [table])]).html()
    assert (
        "<caption><em>Held out</em>: rows &amp; 2 * 3 &lt; 7; <em>by chance</em> about it.</caption>" in html
    )
