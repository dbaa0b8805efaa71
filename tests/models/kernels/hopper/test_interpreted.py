"""The Hopper kernels run by Pallas's GPU interpreter on a CPU, with race detection.

Products and layouts are replaced there (see `operations`): this tests indices, masks, barriers and copies.
"""

import dataclasses

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modicum.models.kernels import Causal, Dense
from modicum.models.kernels.hopper import Hopper

from .cases import CASES, DROPOUT, SQUARE, Case, assert_within_twice_plain

pytestmark = pytest.mark.usefixtures("quick_compile", "compiled_once")
# some cases take long, and what they alone would show only a GPU does
ALONE = ("full", "window", "prefix, longer keys", "no key for most", "bucketed bias, far tiles")
INTERPRETED = Hopper(interpret=InterpretGPUParams(detect_races=True))


def interpreted(case):
    return pytest.param(case, id=case.name, marks=[] if case.name == "ALiBi" else pytest.mark.slow)


@pytest.mark.parametrize("case", [interpreted(case) for case in CASES if case.name not in ALONE])
def test_within_twice_the_error_of_plain_attention(case):
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert_within_twice_plain(case, INTERPRETED)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.slow
@pytest.mark.usefixtures("reduce_adds")
@pytest.mark.parametrize(
    "case",
    [
        Case("causal, groups, soft cap", Causal(), 128, 128, soft_cap=5.0),
        Case("dense mask, dropout", Dense(SQUARE), 128, 128, dropout=DROPOUT),
    ],
    ids=lambda case: case.name,
)
def test_one_kernel_for_all_gradients(case):
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert_within_twice_plain(case, dataclasses.replace(INTERPRETED, deterministic=False))
    assert not gpu_callbacks.get_races().races_found
