"""Models made by hand, in which it is known which neuron answers to which word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models import MLP, Transformer, TransformerConfig, multi_head
from modicum.models.heads import ClassifierHead

WORDS, WIDTH, NEURONS, LAYERS = 24, 24, 16, 2


def encoder(head=None, **changes):
    config = TransformerConfig(
        kind="encoder",
        layers=LAYERS,
        width=WIDTH,
        vocab=WORDS,
        attention=multi_head(2),
        mlp=MLP(NEURONS, "relu"),
        **changes,
    )
    return Transformer(config, head)


@pytest.fixture(scope="session")
def planted():
    """`(detectors, labels=2) -> (model, params)`: neuron (layer, n) fires at a word; layers write nothing.

    `detectors` maps (layer, neuron) to a word. The other neurons fire at random mixtures of the words that
    no detector is for.
    """

    def make(detectors, labels=2):
        model = encoder(ClassifierHead(labels, "mean"))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        params["embedding"]["table"] = np.eye(WORDS, WIDTH, dtype=np.float32)
        numbers = np.random.default_rng(7)
        params["classifier"]["kernel"] = numbers.normal(size=(WIDTH, labels)).astype(np.float32)
        params["final_norm"]["scale"] += 1
        found = set(detectors.values())
        for layer in range(LAYERS):
            own = params[f"layers_{layer}"]
            own["mlp_norm"]["scale"] += 1
            own["attention_norm"]["scale"] += 1
            kernel = numbers.normal(size=(WIDTH, NEURONS)).astype(np.float32)
            kernel[list(found)] = 0
            for (where, neuron), word in detectors.items():
                if where == layer:
                    kernel[:, neuron] = 0
                    kernel[word, neuron] = 1
            own["mlp"]["up"]["kernel"] = kernel
        return model, params

    return make


@pytest.fixture(scope="session")
def texts():
    """`(rows, words, seed) -> batches`: the text of label i has the word `words[i]` (None: none of them)."""

    def make(rows, words, seed=0, size=32, shuffled=False):
        numbers = np.random.default_rng(seed)
        others = [word for word in range(1, WORDS) if word not in words]
        tokens = numbers.choice(others, (rows, 6)).astype(np.int32)
        label = numbers.integers(0, len(words), rows).astype(np.int32)
        for row, each in enumerate(label):
            if words[each] is not None:
                tokens[row, numbers.integers(0, 5)] = words[each]
        segments = np.ones_like(tokens)
        segments[::3, 5] = 0  # padding, in which a detector must not look
        tokens[::3, 5] = words[-1]
        label = numbers.permutation(label) if shuffled else label
        batch = {"tokens": tokens, "segments": segments, "label": label, "weight": np.ones(rows, np.float32)}
        return [{name: a[i : i + size] for name, a in batch.items()} for i in range(0, rows, size)]

    return make
