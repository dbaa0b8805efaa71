"""The ring of buffers, interpreted: as it is, and with faults that the race detection has to find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from modicum.models.kernels.hopper.operations import Interpreted
from modicum.models.kernels.hopper.problem import CONSUMERS
from modicum.models.kernels.hopper.ring import Ring, copy_all

from .conftest import KNOWS_PROXIES

TILES, SIZE, STAGES = 6, 8, 2
PARAMS = InterpretGPUParams(detect_races=True)


def by_threads(total, tile):
    """As log-sum-exps, biases and hashes are read."""
    return total + Interpreted().tile(tile)


def by_tensor_cores(total, tile):
    """As queries, keys and values are."""
    return total + Interpreted().product(tile, tile)


def right(read, ring, slot, total, fence):
    total = read(total, ring.buffers[0].at[slot])
    ring.release(slot, read=fence)
    return total


def too_early(read, ring, slot, total, fence):
    ring.release(slot, read=fence)
    return read(total, ring.buffers[0].at[slot])


def summed(consume, read, fence):
    """The sums over tiles that each computing warpgroup finds, and whether anything raced."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    values = jnp.asarray(np.random.default_rng(0).integers(0, 3, (TILES, SIZE, SIZE)), jnp.float32)

    def body(tiles, out, ring):
        warpgroup = lax.axis_index("warpgroup")

        def step(number, total):
            slot = ring.slot(number)
            ring.wait(slot)
            return consume(read, ring, slot, total, fence)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            out[warpgroup] = lax.fori_loop(0, TILES, step, jnp.zeros((SIZE, SIZE)))

        pl.when(warpgroup == CONSUMERS)(lambda: copy_all([ring], TILES, lambda i: [[tiles.at[i]]]))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((CONSUMERS, SIZE, SIZE), jnp.float32),
        scratch_types=(Ring.scratch(STAGES, [plgpu.SMEM((STAGES, SIZE, SIZE), jnp.float32)]),),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=PARAMS,
    )
    found = kernel(values)
    wanted = functools.reduce(lambda total, tile: read(total, tile), values, 0)
    return found, wanted


def raced(*given):
    """Whether the interpreter reported a race; newer ones raise it."""
    try:
        summed(*given)
    except jax.errors.JaxRuntimeError as error:
        return "RACE DETECTED" in str(error)
    return gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(("read", "fence"), [(by_threads, True), (by_tensor_cores, False)])
def test_every_tile_is_read_before_the_next_is_copied_over_it(read, fence):
    found, wanted = summed(right, read, fence)
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, found.shape))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("read", [by_threads, by_tensor_cores])
def test_a_stage_that_is_freed_too_early_is_found(read):
    assert raced(too_early, read, True)


@pytest.mark.skipif(not KNOWS_PROXIES, reason="JAX before 0.12 takes threads and copy engine for one party")
def test_a_read_by_threads_without_a_fence_is_found():
    assert raced(right, by_threads, False)
