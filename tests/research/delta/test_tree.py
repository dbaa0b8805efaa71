"""The tree of a tuned model: what it counts, what it folds, and that its drawings are well formed."""

from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest

from modicum.models import ClassifierHead, GroupedQuery, Transformer, TransformerConfig
from modicum.research.delta import (
    Adapter,
    BitFit,
    Full,
    LoRA,
    attach,
    attach_leaves,
    byte_count,
    parameter_count,
    to_html,
    to_svg,
    tree,
)
from modicum.research.study.collect import report_from_runs
from modicum.research.study.runs import Run


@dataclass(frozen=True)
class Question:
    """What a run asks."""

    method: str = "lora"


SPEC = {
    "layers_{0,2-5}/attention/(query|value)": LoRA(2, initialisation="pissa"),
    "layers_{1}/mlp": BitFit(),
    "mlp/down": Adapter(4),
    "classifier": Full(),
}


@pytest.fixture(scope="module")
def case():
    """Makes the tuned model, of shapes alone."""

    def make(scan):
        config = TransformerConfig(layers=6, width=32, vocab=500, attention=GroupedQuery(4), scan=scan)
        model, tokens = Transformer(config=config, head=ClassifierHead(3)), jnp.zeros((2, 5), int)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        tuned = attach(model, SPEC)
        return tuned, params, jax.eval_shape(tuned.init, jax.random.key(1), params, tokens)

    return make


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_number_and_byte_is_counted_once(case, scan):
    tuned, params, variables = case(scan)
    found = tree(tuned, params, variables)
    numbers, size = found.root.numbers, found.root.bytes
    assert found.backbone == numbers["frozen"] + numbers["tuned"] == parameter_count(params)
    assert found.trained == parameter_count(variables["delta"])
    assert numbers["fixed"] == parameter_count(variables["delta_state"])
    assert size["added"] == byte_count(variables["delta"])
    assert size["frozen"] + size["tuned"] == byte_count(params)
    assert found.percentage == pytest.approx(100 * found.trained / parameter_count(params))
    assert f"trained {found.trained:,}" in str(found) and f"{found.percentage:.3g}%" in str(found)


def test_layers_that_are_alike_are_one_line(case):
    lines = str(tree(*case(False))).splitlines()
    layers = [line.split()[1] for line in lines if "layers_" in line]
    assert layers == ["layers_{0,2-5}", "layers_1"]
    row = next(line for line in lines if "layers_{0,2-5}" in line)
    layer = 12 * 32 * 32 + 13 * 32  # kernels; biases of 4 + 4 + 1 widths and four arrays of norms
    delta = 2 * 4 * (32 * 2) + 2 * 32 * 4 + 32 + 4  # pissa with its start, twice, and an adapter
    assert "×5" in row and f" {5 * (layer + delta):,} " in row


def test_scanned_layers_say_which_rows_are_tuned(case):
    text = str(tree(*case(True)))
    assert "added + fixed, layers 0,2-5 of 6" in text
    offset = next(line for line in text.splitlines() if "~bitfit/offset" in line)
    assert "float32[1, 32]" in offset and offset.endswith("added, layers 1 of 6")


def test_what_is_frozen_can_be_left_folded(case):
    found = tree(*case(True))
    brief = found.text(brief=True).splitlines()
    assert any(line.startswith("├─ embedding ") and line.endswith("frozen") for line in brief)
    assert not any(line.startswith("│  └─ table") for line in brief)
    assert any("~lora" in line for line in brief)
    assert brief[-1] == str(found).splitlines()[-1] == found.totals()


def test_nothing_attached_is_all_frozen(case):
    tuned, params, _ = case(True)
    found = tree(tuned, params, {"delta": {}})
    assert {line.node.label for line in found.lines()} == {"frozen"}
    assert tuned.tree(params, {"delta": {}}) == found
    assert "trained 0 (0 B), 0% of the backbone" in found.totals()


class Balanced(HTMLParser):
    """Checks that every element that opens is closed, and counts them."""

    def __init__(self):
        super().__init__()
        self.open, self.counts, self.text = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_and_the_drawing_say_what_the_text_says(case):
    found = tree(*case(True))
    page = Balanced()
    page.feed(to_html(found, "A & B"))
    modules = sum(1 for line in found.lines() if line.node.children)
    assert page.open == [] and page.counts["details"] == modules
    assert page.counts["div"] == sum(1 for _ in found.lines()) - modules
    assert found.totals() in page.text and "A & B" in page.text
    drawing = ElementTree.fromstring(to_svg(found))
    text = "\n".join("".join(element.itertext()) for element in drawing.iter())
    for line in found.lines(brief=True):
        assert line.node.name in text
    assert found.totals() in text
    assert "http" not in to_html(found)  # nothing is loaded from anywhere


def test_the_report_of_a_tuned_run_shows_its_tree(case, tmp_path):
    run = Run.open(tmp_path, Question(), seed=0)
    run.finish({"accuracy": 0.5})
    tuned, params, variables = case(True)
    assert "what is tuned" not in report_from_runs(tmp_path).html()
    (run.folder / "tree.txt").write_text(str(tuned.tree(params, variables)), encoding="utf-8")
    page = report_from_runs(tmp_path).html()
    assert "what is tuned" in page and "added + fixed, layers 0,2-5 of 6" in page


def test_names_are_escaped():
    params = {"<script>&": {"bias": jnp.ones(3)}}
    tuned = attach_leaves(lambda params, x: x + params["<script>&"]["bias"], BitFit())
    found = tree(tuned, params, tuned.init(jax.random.key(0), params))
    assert "<script>&" in str(found)
    for drawn in (to_html(found), to_svg(found)):
        assert "<script>" not in drawn and "&lt;script&gt;&amp;" in drawn
    ElementTree.fromstring(to_svg(found))
