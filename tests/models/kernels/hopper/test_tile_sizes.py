"""Which tile sizes the Hopper kernels take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import Causal, DenseBias, Dropout, Full, Terms, Window, block_sizes
from modicum.models.kernels.block_sizes import FIELDS
from modicum.models.kernels.hopper import Hopper, padding
from modicum.models.kernels.hopper.operations import Warpgroup
from modicum.models.kernels.hopper.problem import Problem, Tiles
from modicum.models.kernels.hopper.tile_sizes import NAMES, constants, plan

from .test_supports import INTERPRETED, REQUEST

PROBLEM = Problem(1, 256, 256, 2, 2, 128, jnp.dtype("bfloat16"), 1.0, None, Warpgroup())
BIAS = DenseBias(np.ones((1, 1, 256, 256), np.float32))


@pytest.fixture
def table(monkeypatch):
    def use(*entries):
        anything = dict.fromkeys(FIELDS, "*") | {"length": 512}
        monkeypatch.setattr(block_sizes, "entries", lambda: tuple(anything | entry for entry in entries))

    return use


def test_what_is_asked_for_comes_before_the_table_and_the_table_before_constants(table):
    assert plan(PROBLEM, Terms(Full())) == constants(128, None)
    table({"implementation": "hopper forward", "width": 128, "mask": "window", "blocks": [64, 64, 4]})
    found = plan(PROBLEM, Terms(Window(5, 0)))
    assert found == constants(128, None)._replace(forward=Tiles(64, 64, 4))
    assert plan(PROBLEM, Terms(Causal())).forward == constants(128, None).forward
    asked = (("hopper forward", (64, 64, 3)), ("hopper key gradient", (64, 64, 2)))
    found = plan(PROBLEM, Terms(Window(5, 0)), asked=asked)
    assert (found.forward, found.key_gradient.stages, found.query_gradient.stages) == (Tiles(64, 64, 3), 2, 3)


@pytest.mark.parametrize("terms", [{"bias": BIAS}, {"dropout": Dropout(0.1, np.uint32(0))}])
def test_what_the_table_does_not_know_has_constants(table, terms):
    table({"implementation": "hopper forward", "blocks": [64, 64, 9]})
    problem = dataclasses.replace(PROBLEM, rate=0.1 if "dropout" in terms else 0.0)
    wanted = constants(128, terms.get("bias"), dropped="dropout" in terms)
    assert plan(problem, Terms(Full(), **terms)) == wanted


def test_blocks_that_no_kernel_can_have_are_refused(table):
    table({"implementation": "hopper query gradient", "blocks": [64, 128, 2]})
    with pytest.raises(InputError, match=r"query gradient has blocks \[64, 128, 2\]; they must be \[64, 64,"):
        plan(PROBLEM, Terms(Full()))


def test_constants_are_the_first_candidates_and_candidates_are_taken():
    for width in (64, 128):
        request = dataclasses.replace(REQUEST, width=width, value_width=width)
        for (field, name), sizes in zip(NAMES.items(), INTERPRETED.candidates(request).values()):
            assert Tiles(*sizes[0]) == getattr(constants(width, None), field)
            assert len(set(sizes)) == len(sizes) == 3
            for blocks in sizes:
                tiles = INTERPRETED.with_blocks(name, blocks).tiles
                problem = dataclasses.replace(PROBLEM, width=width)
                assert getattr(plan(problem, Terms(Full()), asked=tiles), field) == Tiles(*blocks)
    assert not INTERPRETED.candidates(dataclasses.replace(REQUEST, bias=BIAS))
    assert not dataclasses.replace(INTERPRETED, deterministic=False).candidates(REQUEST)


def test_blocks_reach_the_kernels(monkeypatch):
    seen = []
    monkeypatch.setattr(padding, "attend", lambda problem, plan, _: seen.append(plan))
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    tiles = Hopper().with_blocks("hopper forward", (64, 64, 5)).tiles
    with pytest.raises(TypeError):  # what stands in the place of the kernels returns nothing
        jax.eval_shape(lambda q: padding.padded_attention(q, q, q, Terms(Full()), tiles=tiles), q)
    assert seen[0].forward == Tiles(64, 64, 5)
