"""The code on docs/neurons.md runs, in the order in which it stands there."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modicum.models.pretrained
from modicum.models import MLP, Transformer, TransformerConfig, multi_head
from modicum.research.neurons import ablate_each

pytestmark = pytest.mark.usefixtures("quick_compile")

PAGE = Path(__file__).parents[3] / "docs" / "neurons.md"
SIZES = {"layers": 4, "width": 8, "vocab": 11, "attention": multi_head(2), "mlp": MLP(72)}


def random(model, tokens):
    numbers = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return jax.tree.map(lambda leaf: numbers.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture
def named(monkeypatch):
    """What the page takes as given."""
    numbers, tokens = np.random.default_rng(1), np.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
    model = Transformer(TransformerConfig(**SIZES))
    encoder = Transformer(TransformerConfig(kind="encoder", **SIZES), None)
    minilm = SimpleNamespace(model=encoder, params=random(encoder, tokens))
    monkeypatch.setattr(modicum.models.pretrained, "load_minilm", lambda: (minilm, None))
    masks = numbers.random((4, 72)) < 0.5
    tasks = {name: numbers.random((4, 72)) for name in ("sst2", "cr", "mrpc", "qnli")}
    return {
        "model": model,
        "params": random(model, tokens),
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "clean": tokens,
        "corrupted": tokens[::-1],
        "masks": jnp.asarray(masks, jnp.float32),
        "loss": lambda logits: -jax.nn.log_softmax(logits[:, -1])[:, 2].mean(),
        "difference": lambda logits: (logits[:, -1, 2] - logits[:, -1, 5]).sum(),
        "predictivities": tasks,
        "kinds": ["sentiment", "sentiment", "pairs", "pairs"],
        "groups": ["sentiment", "sentiment", "pairs", "pairs"],
        "transfer": numbers.random((4, 4)),
        "states": numbers.random((4, 4, 72)),
        "ratings": np.asarray([1.0, 1.0, 0.0, 0.0]),
    }


def traced(code, named, *results):
    """Shapes of the variables that `code` makes with the parameters as arguments; none is computed."""

    def run(params):
        made = named | {"params": params}
        exec(code, made)
        return {name: made[name] for name in results}

    return jax.eval_shape(run, named["params"])


def test_the_code_on_the_page_runs(named):
    reading, relating, all_neurons = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    reading += "\nsites = dict.fromkeys(sites, 0)"  # shapes are no values
    made = traced(
        reading, named, "drops", "back", "heard", "logits", "maps", "sites", "early", "both", "masked"
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, made)
    assert shapes["drops"] == (72,) and shapes["back"] == (4,) and shapes["heard"] == (2,)
    assert shapes["logits"] == (4, 2, 4, 11) and shapes["masked"] == shapes["both"][0] == (2, 4, 11)
    assert shapes["maps"]["layers_0/attention"] == (2, 2, 4, 4) and list(made["early"]) == [
        "layers_0/residual"
    ]
    assert {"embedded", "layers_3/mlp/act", "layers_0/residual", "head"} <= made["sites"].keys()
    exec(relating, named)
    assert named["similar"].shape == (4, 4) and named["scores"].shape == (4, 72)
    named |= {"jax": jax, "ablate_each": ablate_each}  # as the page's first block has them
    exec(all_neurons, named)
    minilm = named["pretrained"]
    assert jax.eval_shape(named["drops"], minilm.params).shape == (72, 2, 8)
