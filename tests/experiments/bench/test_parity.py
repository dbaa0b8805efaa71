"""Both sides of the benchmark compute the same thing: logits, gradients and AdamW's steps agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum.experiments.bench.job import DecoderJob
from modicum.experiments.bench.ours import Ours

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

JOB = DecoderJob(layers=2, width=48, heads=3, length=32, batch=3, vocab=101)


def numbers(tree):
    """The tree in numpy: the train step donates its arrays."""
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def initial():
    """Our parameters, with norms and biases off their initial ones and zeros so that their places matter."""
    rng = np.random.default_rng(0)
    params = numbers(Ours(JOB).state.trainable)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.fixture
def sides(initial):
    """Ours and PyTorch's, with the same parameters."""
    from modicum.experiments.bench.torch_decoder import load_parameters
    from modicum.experiments.bench.torch_training import TorchTraining

    ours, theirs = Ours(JOB), TorchTraining(JOB, compiled=False)
    ours.state = ours.state.replace(trainable=jax.tree.map(jnp.asarray, initial))
    load_parameters(theirs.model, initial)
    return ours, theirs


def assert_near(ours, theirs, tolerance=1e-4):
    """Equal within `tolerance` of the largest number."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_logits(sides):
    ours, theirs = sides
    tokens = JOB.batches()[0][0]
    logits = ours.model.apply(ours.state.trainable, tokens)
    assert_near(logits, theirs.model(torch.from_numpy(tokens).long()))


def test_gradients_of_every_parameter(sides):
    from modicum.experiments.bench.torch_decoder import Decoder, load_parameters, next_token_loss

    ours, theirs = sides
    tokens, targets = JOB.batches()[0]
    batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}
    gradients = jax.grad(lambda p: ours.loss(p, {}, batch, None).total / JOB.tokens)(ours.state.trainable)
    next_token_loss(theirs.model, *(torch.from_numpy(x).long() for x in (tokens, targets))).backward()
    carried = Decoder(JOB)
    load_parameters(carried, numbers(gradients))
    names = dict(theirs.model.named_parameters())
    assert len(names) == 4 + 12 * JOB.layers
    for name, expected in carried.named_parameters():
        assert_near(expected.detach().numpy(), names[name].grad)


def test_five_steps_of_adamw(sides):
    ours, theirs = sides
    losses = np.asarray([(ours.run(1), theirs.run(1)) for _ in range(5)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
    assert losses[4, 0] < losses[0, 0]


def test_every_parameter_is_carried(initial):
    """None is left at PyTorch's own initial value."""
    from modicum.experiments.bench.torch_decoder import Decoder, load_parameters

    model = Decoder(JOB)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_parameters(model, initial)
    assert sum(p.numel() for p in model.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(initial))
    assert not any(p.isnan().any() for p in model.parameters())
