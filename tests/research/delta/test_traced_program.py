"""LoRA attached to our Transformer is, traced and compiled, the program with LoRA written into the model."""

from collections import Counter
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from modicum.models import GatedMLP, RMSNorm, Rotary, Transformer, TransformerConfig
from modicum.models.attention import AttentionModule, GroupedQuery
from modicum.models.products import project
from modicum.research.delta import LoRA, attach

RANK, SCALE = 2, 4.0

pytestmark = pytest.mark.usefixtures("quick_compile")


class WithLoRA(AttentionModule):
    """Our attention with the method's two lines in it, as one would write them into the model."""

    def _project(self, x, name, heads, positions=None):
        width = heads * self.choice.width_of_head(self.config.width)
        y = self.config.linear(width, self.choice.bias, name=name)(x)
        if name in ("query", "value"):
            a = self.param(f"{name}_a", nn.initializers.normal(0.1), (x.shape[-1], RANK))
            b = self.param(f"{name}_b", nn.initializers.normal(0.1), (RANK, width))
            y = y + project(project(x, a) * SCALE, b)
        y = y.reshape(*x.shape[:2], heads, -1)
        return y if positions is None else self.config.positions.rotate(y, positions)


@dataclass(frozen=True)
class HandWritten(GroupedQuery):
    """Builds the attention above."""

    def build(self, config, cross=False):
        return WithLoRA(config, self, cross, name="attention")


def operations(jaxpr):
    """How often each primitive with each result type occurs, inner programs included."""
    counts = Counter()
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for each in value if isinstance(value, tuple) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    counts += operations(inner)
        counts[equation.primitive.name, str([out.aval for out in equation.outvars])] += 1
    return counts


def as_ours(theirs):
    """`query_a` beside `query` as `query/~lora/a`."""
    moved = {}
    for keys, leaf in flatten_dict(theirs).items():
        name, _, part = keys[-1].rpartition("_")
        moved[(*keys[:-1], name, "~lora", part) if part in ("a", "b") and name else keys] = leaf
    return moved


@pytest.fixture
def both(request):
    """Losses of `(delta, backbone)` of both models, with the same numbers, and their arguments."""
    common = {
        "layers": 2,
        "width": 16,
        "vocab": 40,
        "norm": RMSNorm(),
        "mlp": GatedMLP(24),
        "positions": Rotary(),
    }
    options = {**common, **request.param}
    plain = Transformer(TransformerConfig(**options, attention=GroupedQuery(4, 2)))
    written = Transformer(TransformerConfig(**options, attention=HandWritten(4, 2)))
    tokens = jax.random.randint(jax.random.key(2), (2, 8), 0, 40)
    theirs = jax.jit(written.init)(jax.random.key(0), tokens)
    flat = as_ours(theirs)
    split = [
        unflatten_dict({keys: leaf for keys, leaf in flat.items() if ("~lora" in keys) == own})
        for own in (True, False)
    ]
    tuned = attach(plain, {"attention/(query|value)": LoRA(RANK, alpha=RANK * SCALE)})

    def ours_loss(delta, params):
        return (tuned.apply({"delta": delta}, params, tokens) ** 2).mean()

    own = {keys: leaf for keys, leaf in flatten_dict(theirs).items() if keys[-1].endswith(("_a", "_b"))}
    rest = {keys: leaf for keys, leaf in flatten_dict(theirs).items() if keys not in own}

    def their_loss(delta, params):
        return (written.apply(unflatten_dict({**delta, **params}), tokens) ** 2).mean()

    return (ours_loss, split), (their_loss, (own, rest))


@pytest.mark.parametrize(
    "both", [{}, {"scan": True, "remat": "full"}], ids=["unrolled", "scan and remat"], indirect=True
)
def test_operations_and_flops_equal_the_hand_written_ones(both):
    counts, flops, values = [], [], []
    for loss, arguments in both:
        gradient = jax.value_and_grad(loss)
        counts.append([operations(jax.make_jaxpr(f)(*arguments).jaxpr) for f in (loss, gradient)])
        compiled = jax.jit(gradient).lower(*arguments).compile()
        flops.append(compiled.cost_analysis()["flops"])
        values.append(compiled(*arguments))
    assert counts[0] == counts[1]
    assert flops[0] == flops[1]
    assert sum(counts[0][0].values()) > 50  # there is something to count
    np.testing.assert_array_equal(values[0][0], values[1][0])
    gradients = flatten_dict(values[0][1])
    for keys, wanted in as_ours(unflatten_dict(values[1][1])).items():
        np.testing.assert_array_equal(gradients[keys], wanted)
        assert jnp.abs(wanted).max() > 0
