"""What the interpreter lacks: compiling a kernel once, copies that add, and how wgmma reads."""

import threading

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

from modicum.models.kernels.hopper.operations import TENSOR_CORES

KNOWS_PROXIES = hasattr(shared_memory, "GpuClockBundle")  # from JAX 0.12 on


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


@pytest.fixture(autouse=KNOWS_PROXIES)
def tensor_cores_read(monkeypatch):
    """Reads that stand for wgmma's are those of another party than the thread that waits for them.

    From JAX 0.12 on the interpreter knows that the copy engine may overtake reads of threads that no fence
    has ordered (`commit_smem`), but it looks for no races of wgmma, as which reads the tensor cores and are
    ordered by waiting alone. So in its race detection they have a clock of their own: that of a warp, of
    which our kernels have none. They see what a thread has committed, and whoever waits for the thread
    knows of them.
    """
    from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState

    original = GPURaceDetectionState.check_read

    def check_read(self, thread, clock, key, access, source_info=None):
        if source_info is None or TENSOR_CORES not in str(source_info.name_stack):
            return original(self, thread, clock, key, access, source_info)
        memory = gpu_callbacks._get_shared_memory()
        known = memory.get_clock(thread)
        known.inc(memory.thread_to_vc_position(thread.warp(0)))
        original(self, thread, known.async_smem_clock, key, access, source_info)
        with memory.lock:
            memory.clocks[thread].update(known)

    monkeypatch.setattr(GPURaceDetectionState, "check_read", check_read)


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

        def place(which):
            transforms = gpu_callbacks._remove_noop_transforms(given[f"{which}_transforms"])
            key = gpu_callbacks.HostAllocationKey.from_array(given[f"{which}_allocation_key_as_array"])
            transforms = jax.tree.map(int, transforms)
            if KNOWS_PROXIES:
                return key, memory.access(key, transforms)
            return key, interpret_utils.to_range(transforms)

        if KNOWS_PROXIES:
            thread = given["thread"]
        else:
            thread = memory.get_global_thread_id(int(given["device_id"]), int(given["thread_id"]))
        with lock:
            found = [memory.get_buffer_content(*place(which), thread)[0] for which in ("src", "dst")]
            memory.store_buffer_content(*place("dst"), sum(found), thread)
        return given["token"]

    failing = getattr(gpu_callbacks, "fail_on_exception", lambda function: function)
    monkeypatch.setattr(gpu_callbacks, "copy_smem_to_gmem", failing(copy))
