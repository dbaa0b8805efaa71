"""The price on activations: its schedule, its gradient, on a mesh, and what it does to a small decoder."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import MLP, RoutedMLP, Transformer, TransformerConfig, multi_head, run_with_cache
from modicum.models.placement import placed
from modicum.parallel import Layout, MeshShape, make_mesh
from modicum.research.sparsity import measure
from modicum.research.training.activation_penalty import PRICE, ActivationPenalty
from modicum.research.training.config import OptimizerConfig, TrainingConfig
from modicum.research.training.loop import train
from modicum.research.training.tasks import language_model_job

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(layers=2, width=8, vocab=12, attention=multi_head(2), mlp=MLP(16, "relu"))
TRAINING = TrainingConfig(steps=30, batch=4, optimizer=OptimizerConfig("adamw", 1e-2))


def rows(count=16, length=6):
    draw = np.random.default_rng(0)
    for number in range(count):
        tokens = draw.integers(0, 12, length + 1).astype(np.int32)
        segments = (np.arange(length) < length - number % 3).astype(np.int32)
        yield {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "weights": segments.astype(np.float32),
            "segments": segments,
            "positions": np.arange(length, dtype=np.int32),
        }


ROWS = list(rows())


def job_of(config=CONFIG, price=0.5, layout=None):
    penalty = ActivationPenalty(((0, price),))
    return language_model_job(
        Transformer(config), ROWS, TRAINING, layout=layout or Layout.single(), penalty=penalty
    )


def test_a_price_rises_along_half_sines_and_stays():
    penalty = ActivationPenalty(((10, 0.2), (30, 1.0), (50, 0.6)))
    steps = [0, 10, 20, 30, 40, 50, 99]
    assert [penalty.price(step) for step in steps] == pytest.approx([0.2, 0.2, 0.6, 1.0, 0.8, 0.6, 0.6])
    assert penalty.price(15) == pytest.approx(0.2 + 0.8 * (1 - np.cos(np.pi / 4)) / 2)
    batch = penalty.priced(lambda step: {"tokens": np.zeros((3, 2))})(20)
    np.testing.assert_allclose(batch[PRICE], [0.6] * 3)


def test_the_loss_is_dearer_by_the_price_times_the_mean_size_of_real_tokens():
    config = replace(CONFIG, scan=True)
    job, model = job_of(config), Transformer(config)
    params = jax.jit(job.init)(jax.random.key(0), None)
    batch, rng = dict(job.batches(0)), jax.random.key(1)
    free = {**batch, PRICE: np.zeros_like(batch[PRICE])}

    @jax.jit
    def losses(params):
        found = (
            job.loss(params, {}, batch, rng),
            job.loss(params, {}, free, rng),
            job.loss(params, {}, batch, None),
        )
        inputs = {"segments": batch["segments"], "positions": batch["positions"]}
        return found, run_with_cache(model, params, batch["tokens"], names=["mlp/act"], **inputs)[1]

    (dear, cheap, told), seen = losses(params)
    expected = np.abs(seen["layers/mlp/act"])[:, batch["segments"] > 0].mean()
    np.testing.assert_allclose(dear.metrics["activation_size"] / dear.weight, expected, rtol=1e-5)
    np.testing.assert_allclose((dear.total - cheap.total) / dear.weight, 0.5 * expected, rtol=1e-3)
    np.testing.assert_allclose(told.total, cheap.total, rtol=1e-6)  # evaluation has no price


def test_gradients_are_the_same_on_a_mesh():
    layout = Layout(make_mesh(MeshShape.parse("data=2,tensor=2"), jax.devices()[:4]))
    job = job_of(layout=layout)
    params = jax.jit(job.init)(jax.random.key(0), None)
    batch = dict(job.batches(0))

    def total(params, batch):
        sums = job.loss(params, {}, batch, jax.random.key(1))
        return sums.total / sums.weight

    alone = jax.jit(jax.value_and_grad(total))(params, batch)
    where = layout.parameters(jax.eval_shape(lambda: params), job.axes)
    found = jax.jit(jax.value_and_grad(placed(total, layout)))(
        jax.device_put(params, where), layout.place(batch)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, alone)


def test_a_price_makes_neurons_silent():
    model, shares = Transformer(CONFIG), []
    tokens = np.stack([row["tokens"] for row in ROWS])
    for price in (0.0, 30.0):
        outcome = train(job_of(price=price), TRAINING)
        shares.append(measure(model, outcome.state.trainable, [{"tokens": tokens}]).active_ratio)
    assert shares[1] < 0.6 * shares[0]


def test_what_cannot_be_priced_is_one_line():
    for stages, message in (
        ((), "must be one or more"),
        (((5, 1.0), (5, 2.0)), r"steps \[5, 5\]"),
        (((0, -1.0),), r"prices \[-1\.0\]"),
    ):
        with pytest.raises(InputError, match=message):
            ActivationPenalty(stages)
    with pytest.raises(InputError, match="not for a RoutedMLP"):
        job_of(replace(CONFIG, mlp=RoutedMLP(experts=2, chosen=2, width=8)))
    job = job_of()
    with pytest.raises(InputError, match="matches no site"):
        penalty = ActivationPenalty(((0, 1.0),), "mlp/mid")
        broken = language_model_job(
            Transformer(CONFIG), ROWS, TRAINING, layout=Layout.single(), penalty=penalty
        )
        params = jax.eval_shape(job.init, jax.random.key(0), None)
        jax.eval_shape(broken.loss, params, {}, dict(broken.batches(0)), jax.random.key(1))
