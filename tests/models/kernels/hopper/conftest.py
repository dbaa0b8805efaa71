"""The interpreter compiles a kernel once, not once for each thread of each block."""

import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map


@pytest.fixture
def compiled_once(monkeypatch):
    """In the place of `thread_map._run_jaxpr`, which compiles what it is given whenever it runs it."""
    lock, programs = threading.Lock(), {}

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in programs:
                evaluate = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                programs[id(jaxpr)] = jaxpr, evaluate.lower(consts, *args).compile()
        programs[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
