"""The benchmark's contenders are one model: same logits, gradients and losses from the same weights."""

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.experiments.bench.job import DecoderJob

JOB = DecoderJob(layers=2, width=32, heads=4, length=24, batch=3, vocab=61)


@pytest.fixture(scope="module")
def pair():
    """Our model and parameters, PyTorch's model with the same ones, and a batch."""
    torch = pytest.importorskip("torch", reason="extra `peers`: pip install torch==2.13.0")
    from modicum.experiments.bench.ours import decoder_config
    from modicum.experiments.bench.torch_decoder import Decoder, load_parameters
    from modicum.models import Transformer

    model = Transformer(decoder_config(JOB))
    tokens = np.random.default_rng(0).integers(0, JOB.vocab, (JOB.batch, JOB.length)).astype(np.int32)
    params = model.init(jax.random.key(0), tokens)
    # Biases and scales too: a mistake in one that is zero would not show.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    params = jax.tree.unflatten(tree, noisy)
    theirs = Decoder(JOB)
    load_parameters(theirs, params)
    return torch, model, params, theirs, tokens


@pytest.mark.peers
def test_logits_are_pytorchs(pair):
    torch, model, params, theirs, tokens = pair
    ours = np.asarray(model.apply(params, tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.peers
def test_gradients_are_pytorchs(pair):
    from modicum.experiments.bench.torch_decoder import Decoder, load_parameters, next_token_loss
    from modicum.research.training.objectives import full_tuning, language_modelling

    torch, model, params, theirs, tokens = pair
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.ones(tokens.shape, np.float32),
    }
    loss = language_modelling(full_tuning(model))

    def mean(params):
        sums = loss(params, {}, batch, None)
        return sums.total / sums.weight

    value, gradients = jax.value_and_grad(mean)(params)
    theirs.zero_grad()
    expected = next_token_loss(
        theirs, torch.from_numpy(tokens).long(), torch.from_numpy(batch["targets"]).long()
    )
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    # Our gradients in PyTorch's places: the same copying that loads parameters.
    ours = Decoder(JOB)
    load_parameters(ours, gradients)
    for (name, gradient), parameter in zip(ours.named_parameters(), theirs.parameters()):
        scale = parameter.grad.abs().max().item()
        np.testing.assert_allclose(
            gradient.detach().numpy(), parameter.grad.numpy(), rtol=0, atol=1e-4 * scale + 1e-8, err_msg=name
        )


@pytest.mark.peers
@pytest.mark.slow
def test_the_benchmark_runs_and_prints_every_contender(capsys):
    pytest.importorskip("torch", reason="extra `peers`")
    from modicum.experiments.commands.bench import Bench

    small = {"layers": 1, "width": 32, "heads": 4, "length": 16, "batch": 2, "vocab": 64}
    assert Bench("train", rounds=1, contenders=("ours", "eager"), **small).run() == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and "eager" in said


def test_an_out_that_is_a_file_is_refused(tmp_path):
    from modicum.experiments.commands.bench import Bench

    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Bench("train", out=tmp_path / "out").run()
