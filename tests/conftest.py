"""Eight simulated CPU devices and one compilation cache for every test, and what makes tests quick."""

import gc
import os
from pathlib import Path

import jax
import jaxlib
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"

PLATFORMS = os.environ.get("JAX_PLATFORMS", "cpu")

# Our programs run for moments and compile for seconds: a third of that goes into XLA's newer emitters of
# fused loops, and some into cutting programs into parts that are compiled side by side.
if PLATFORMS == "cpu":
    FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jaxlib.__version__.startswith("0.10."):  # a flag that a jaxlib does not know ends it: 0.12 this one
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])

# Tracing makes so many objects that Python's usual thresholds spend a tenth of the time looking for cycles.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

# Eight devices share one thread pool: with a thread each, collectives can wait for each other for ever
# (`modicum.parallel.processes`). XLA reads this when the first device is used.
os.environ.setdefault("NPROC", "256")
jax.config.update("jax_platforms", PLATFORMS)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # what one worker compiled others load


MOST_MEMORY = 4 << 30  # bytes that a worker keeps between modules; CI has 24 GiB


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs that nobody may need again are let go where they have become many."""
    yield
    if resident_bytes() > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder


@pytest.fixture(scope="session")
def often():
    """`often(few, many)` is how often a test that only repeats does so: `many` in `make check-long`."""
    return lambda few, many: many if os.environ.get("MODICUM_LONG") else few


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compile():
    """Compile with few optimizations: tiny programs spend their time in the compiler."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
