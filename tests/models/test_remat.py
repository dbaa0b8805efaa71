"""What layers compute again changes what is kept between the passes, and no number."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from modicum import InputError
from modicum.models import (
    BF16,
    FP64,
    MLP,
    GatedMLP,
    GroupedQuery,
    Layer,
    RoutedMLP,
    Transformer,
    TransformerConfig,
)
from modicum.models.remat import NAMES, remat_runs, remat_text

pytestmark = pytest.mark.usefixtures("quick_compile")

BASE = TransformerConfig(
    layers=4, width=8, vocab=19, attention=GroupedQuery(2), mlp=MLP(32), precision=FP64, dropout=0.0
)
ROWS = np.random.default_rng(0).integers(0, 19, (2, 5))


def score(config):
    model = Transformer(config)
    weights = jnp.sin(jnp.arange(2 * 5 * 19)).reshape(2, 5, 19)  # any fixed direction
    return model, lambda params: (model.apply(params, ROWS, train=True) * weights).sum()


def kept_bytes(config, params):
    """Bytes kept for the backward pass of what has tokens, 2 rows of 5."""
    residuals = [aval for aval, _ in saved_residuals(score(config)[1], params)]
    return sum(aval.size * aval.dtype.itemsize for aval in residuals if {5, 2 * 5} & set(aval.shape))


@pytest.fixture(scope="module")
def plain(random_parameters):
    with jax.enable_x64(True):
        model, loss = score(BASE)
        params = random_parameters(model, ROWS)
        return params, jax.jit(jax.grad(loss))(params)


def same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), one, other)


@pytest.mark.parametrize("remat", ["mlp", "middle", "full:1,middle:2,none:1"])
def test_unrolled_layers_that_compute_again_have_the_same_gradient(remat, plain, x64):
    params, gradient = plain
    same(jax.jit(jax.grad(score(replace(BASE, remat=remat))[1]))(params), gradient)


@pytest.mark.parametrize("remat", ["mlp", "full:3,none:1", "dots:2,mlp:2"])
def test_scanned_layers_that_compute_again_have_the_same_gradient(remat, plain, x64):
    from modicum.models import stack_layers

    params, gradient = plain
    config = replace(BASE, scan=True, remat=remat)
    stacked = stack_layers(params)
    same(jax.jit(jax.grad(score(config)[1]))(stacked), stack_layers(gradient))
    fresh = jax.eval_shape(Transformer(config).init, jax.random.key(0), ROWS)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_policies_keep_less_and_less(scan, plain, x64):
    from modicum.models import stack_layers

    params = stack_layers(plain[0]) if scan else plain[0]
    policies = ["none", "dots", "mlp", "middle", "full"]
    sizes = [kept_bytes(replace(BASE, scan=scan, remat=policy), params) for policy in policies]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    numbers, stream = 8, 2 * 5 * 8
    assert sizes[3] - sizes[4] == 4 * numbers * stream  # the stream after attention, of each of 4 layers
    part = kept_bytes(replace(BASE, scan=scan, remat="full:2,none:2"), params)
    assert sizes[4] < part < sizes[0]


def test_beside_other_policies_none_keeps_no_weight_and_nothing_inside_of_norms():
    """A scan would stack each weight in the products' type, and float32 values as large as the stream."""
    config = replace(BASE, scan=True, precision=BF16)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), ROWS)

    def weights(remat):
        kept = [aval for aval, _ in saved_residuals(score(replace(config, remat=remat))[1], params)]
        narrow = {aval.shape[1:] for aval in kept if aval.dtype == jnp.bfloat16}
        return narrow & {(8, 8), (8, 32), (32, 8)}

    assert len(weights("none")) == 3  # the test sees them where they are kept
    assert not weights("none:2,dots:2")
    none, dots, mixed = (
        kept_bytes(replace(config, remat=remat), params) for remat in ("none", "dots", "none:2,dots:2")
    )
    assert dots < mixed <= (none + dots) / 2


def test_a_pattern_is_split_between_its_periods(random_parameters, x64):
    pattern = (Layer(), Layer(GroupedQuery(4, 2, window=2), GatedMLP(10)))
    config = replace(BASE, pattern=pattern, scan=True)
    model, loss = score(config)
    params = random_parameters(model, ROWS)
    same(
        jax.jit(jax.grad(score(replace(config, remat="full:2,mlp:2"))[1]))(params),
        jax.jit(jax.grad(loss))(params),
    )
    with pytest.raises(InputError, match="scanned layers come in periods of 2"):
        replace(config, remat="full:1,none:3")


def test_what_cannot_be_split_says_so(x64):
    model, _ = score(replace(BASE, scan=True, remat="full:2,none:2", dropout=0.1))
    params = jax.eval_shape(model.init, jax.random.key(0), ROWS)
    with pytest.raises(InputError, match="scanned layers with dropout take one policy"):
        jax.eval_shape(lambda p: model.apply(p, ROWS, train=True, rng=jax.random.key(0)), params)
    routed = Transformer(replace(model.config, dropout=0.0, mlp=RoutedMLP(4, 2, 4)))
    params = jax.eval_shape(routed.init, jax.random.key(0), ROWS)
    sown = {"train": True, "mutable": ["routing"]}
    with pytest.raises(InputError, match="scanned layers with routed experts"):
        jax.eval_shape(lambda p: routed.apply(p, ROWS, **sown), params)
    with pytest.raises(InputError, match="an encoder-decoder takes one policy"):
        replace(BASE, kind="encoder-decoder", remat="full:2,none:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", "remat='some' is not one of none, dots, mlp, middle, full, offload, nor runs"),
        ("full:2,none:1", "remat='full:2,none:1' is for 2 [+] 1 layers; the model has 4"),
        ("full:4,none:0", "is for 4 [+] 0 layers"),
        ("full:2,half:2", "is not one of none"),
    ],
)
def test_bad_policies_are_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        replace(BASE, remat=text)
    assert "\n" not in str(error.value)


def test_policies_are_written_as_they_are_read():
    choices = ("full", "none", "full", "mlp")
    text = remat_text(choices)
    assert text == "none:1,mlp:1,full:2"
    assert sorted(name for name, count in remat_runs(text, 4) for _ in range(count)) == sorted(choices)
    assert [remat_text((name,) * 3) for name in NAMES] == list(NAMES)
