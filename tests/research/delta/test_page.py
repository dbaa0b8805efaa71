"""docs/delta.md: its code runs, and its table is what the classes say of themselves."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.attention import GroupedQuery
from modicum.models.transformer import Transformer, TransformerConfig
from modicum.research import delta
from modicum.research.delta.methods import LeafMethod, SiteMethod
from modicum.research.delta.peft.kinds import CODECS

PAGE = (Path(__file__).parents[3] / "docs" / "delta.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "`" in line
]

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Transformer(TransformerConfig(layers=12, width=16, vocab=30, attention=GroupedQuery(2)))
    rng, tokens = jax.random.key(0), jnp.arange(12).reshape(4, 3)
    names = {"model": model, "rng": rng, "tokens": tokens, "jnp": jnp, "params": model.init(rng, tokens)}
    exec(BLOCKS[0], names)
    tuned, fresh = names["tuned"], names["variables"]
    draw = np.random.default_rng(0)

    def trained():
        return {**fresh, "delta": jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape), fresh["delta"])}

    backbone, names["variables"] = names["params"], trained()
    for letter in "ab":
        names |= {f"tuned_{letter}": tuned, f"variables_{letter}": trained()}
    exec(BLOCKS[1], names)
    for ours, theirs in zip(*map(jax.tree.leaves, (names["params"], backbone))):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert all(lost < 1e-5 for lost in names["plain"].residual.values())
    exec(BLOCKS[2], names)
    alone = model.apply(backbone, tokens)
    np.testing.assert_allclose(names["logits"][2], alone[2], atol=1e-4)
    assert np.abs(names["logits"][0] - alone[0]).max() > 1e-2


def test_every_method_is_in_the_table():
    named = {name for row in ROWS for name in re.findall(r"`(\w+)", row[1])}
    unlisted = {each.__name__ for each in delta.METHODS.values()} - named - {"ShiftPositions"}
    assert not unlisted


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace(" ", "-") for row in ROWS])
def test_a_row_says_what_the_class_can(row):
    classes = {each.__name__: each for each in delta.METHODS.values()}
    method = classes[next(name for name in re.findall(r"`(\w+)", row[1]) if name in classes)]
    base = SiteMethod if issubclass(method, SiteMethod) else LeafMethod
    for name, said in zip(("merge", "unmerge", "scaled"), row[4:7]):
        can = getattr(method, name, True) is not getattr(base, name, None)
        assert said.startswith("yes" if can else "no"), name
    exchanged = any(method in codec.methods for codec in CODECS)
    assert exchanged == (row[7] != "–")
