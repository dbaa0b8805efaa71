"""What the interpreter lacks: compiling a kernel once, and copies that add."""

import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


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


@pytest.fixture
def reduce_adds(monkeypatch):
    """Copies to device memory that add to what is there, which the interpreter does not have.

    Each is done at once and whole, as the GPU promises of each number. Not shown by this: that the order of
    additions is any, as rounding sees it; and races with other accesses, which the interpreter does not look
    for in copies out of shared memory of any kind.
    """
    lock, original = threading.Lock(), gpu_callbacks.copy_smem_to_gmem

    def copy(*, reduction_op, **given):
        if reduction_op is None:
            return original(reduction_op=None, **given)
        assert reduction_op == "add" and given["predicate"] is None
        memory = gpu_callbacks._get_shared_memory()
        thread = memory.get_global_thread_id(int(given["device_id"]), int(given["thread_id"]))

        def place(which):
            transforms = gpu_callbacks._remove_noop_transforms(given[f"{which}_transforms"])
            key = gpu_callbacks.HostAllocationKey.from_array(given[f"{which}_allocation_key_as_array"])
            return key, interpret_utils.to_range(jax.tree.map(int, transforms))

        with lock:
            found = [memory.get_buffer_content(*place(which), thread)[0] for which in ("src", "dst")]
            memory.store_buffer_content(*place("dst"), sum(found), thread)
        return given["token"]

    monkeypatch.setattr(gpu_callbacks, "copy_smem_to_gmem", copy)
