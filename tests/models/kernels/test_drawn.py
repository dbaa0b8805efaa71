"""Every implementation on drawn cases: mask x bias x GQA x soft cap x lengths x sinks x dropout.

Another implementation is one more line of `IMPLEMENTATIONS`: itself and what `drawing.cases` may draw for it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from modicum.models.kernels import Implementation
from modicum.models.kernels.chunked import Chunked
from modicum.models.kernels.reference import Reference
from modicum.models.kernels.whole import Whole

from .cases import check, computed
from .drawing import cases, masks

IMPLEMENTATIONS: dict[str, tuple[Implementation, st.SearchStrategy]] = {
    "chunked": (Chunked(block=8), cases()),
    "reference": (Reference(), cases()),
    "whole": (
        Whole(),
        cases(bias=lambda sizes: st.none(), soft_cap=False, sinks=False, dropout=False),
    ),
}
pytestmark = pytest.mark.usefixtures("quick_compile")
FEW = {"chunked": 3, "reference": 2, "whole": 2}
MANY = [pytest.mark.slow, pytest.mark.timeout(900)]


def drawn(name, dtype, examples):
    implementation, strategy = IMPLEMENTATIONS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def each(case):
        check(implementation, case, dtype)

    each()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float32_errs_by_rounding_only(name):
    drawn(name, jnp.float32, FEW.get(name, 3))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_bfloat16_errs_no_more_than_twice_the_plain_softmax(name):
    drawn(name, jnp.bfloat16, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=MANY) for name in IMPLEMENTATIONS])
def test_many_cases(name, dtype):
    drawn(name, dtype, 15)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_zero_cotangent_gives_zero_gradients(name):
    implementation, strategy = IMPLEMENTATIONS[name]

    @settings(max_examples=1, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(case=strategy)
    def each(case):
        case = dataclasses.replace(case, d_out=case.d_out * 0, d_lse=case.d_lse * 0)
        found = computed(implementation, case, jnp.float32)
        for gradient in (
            found.dq,
            found.dk,
            found.dv,
            *found.bias,
            *([found.sinks] if found.sinks is not None else []),
        ):
            np.testing.assert_array_equal(gradient, 0)

    each()


def test_the_comparison_sees_a_wrong_result():
    class Wrong(Reference):
        def __call__(self, q, k, v, terms):
            out, lse = super().__call__(q, k, v, terms)
            return out + 1e-3 * q, lse

    @settings(max_examples=1, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(case=cases(mask=masks))
    def each(case):
        with pytest.raises(AssertionError, match=r"out.* errs by"):
            check(Wrong(), case)

    each()
