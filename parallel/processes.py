"""Several processes as one run, through `jax.distributed`: XLA's own runtime, nothing of ours in between."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from .. import InputError

# What the launchers that jax.distributed recognises leave in the environment (jax 0.10 to 0.12,
# jax._src.clusters).
LAUNCHER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
)

SUPERVISED = "MODICUM_SUPERVISED"
"""Set in a process whose parent watches it and forwards signals (`experiments.commands.supervision`)."""

HEARTBEAT_SECONDS = 40
"""How long a process may be silent before all others end: with the rest it takes less than a minute."""

LOST_PROCESS = re.compile(
    r"Gloo .*(failed|closed|reset|timed? ?out)|unhealthy|heartbeat|Socket closed"
    r"|Connection (reset|closed|refused)|NCCL .*(failure|error)|coordination service"
    r"|Barrier .*(failed|timed out)|Terminating process because",
    re.IGNORECASE | re.DOTALL,
)


def launched() -> bool:
    """Whether a launcher of several processes has left its marks in the environment."""
    return any(variable in os.environ for variable in LAUNCHER_VARIABLES)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that another process of this run cannot be reached."""
    if not jax.distributed.is_initialized():
        return False
    return LOST_PROCESS.search(str(error)) is not None or (
        error.__cause__ is not None and is_lost_process(error.__cause__)
    )


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Join the processes of this run; call it before anything touches a device.

    Without arguments the launcher is recognised (Slurm, Open MPI, Cloud TPU, GKE) and where there is none
    this is a single process and nothing happens; nothing happens either for a `count` of 1, or when called
    again.

    coordinator  host:port of process 0, reachable by all, the same everywhere
    count        number of processes
    index        which of them this is, from 0

    Raises InputError if only some of the three are given, or the index is out of range.
    """
    _give_simulated_devices_threads()
    if jax.distributed.is_initialized() or count == 1:
        return
    given = {"coordinator": coordinator, "count": count, "index": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        _initialize_by_launcher()
        return
    if coordinator is None or count is None or index is None:
        raise InputError(
            f"processes: {' and '.join(missing)} missing; give all of {', '.join(given)} or none"
        )
    if ":" not in coordinator:
        raise InputError(f"processes: coordinator {coordinator!r} is no host:port")
    if count < 1 or not 0 <= index < count:
        raise InputError(f"processes: index {index} of {count} processes; an index runs from 0 to count - 1")
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Run the block in the main process, then in the others: what the first has made, they find.

    Where the block raises in the first, the others run it too, and raise for themselves.
    """
    if not is_main():
        barrier(name)
    try:
        yield
    finally:
        if is_main():
            barrier(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process has to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


THREADS_PER_SIMULATED_DEVICE = 32


def _give_simulated_devices_threads() -> None:
    """Enlarge the thread pool of XLA's CPU client, where one CPU stands for several devices.

    It has as many threads as devices or cores. A device may wait in several collectives at once, each in a
    thread of its own; when no thread is left for the device it waits for, the process aborts after 40
    seconds (jaxlib 0.10.2: 5 of 10 ZeRO-3 runs on 2 devices and 2 cores did). The client reads the number
    from NPROC when it starts.
    """
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_SIMULATED_DEVICE * devices))


def _initialize_by_launcher() -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError:
        # Devices are in use already, so JAX did not look for a launcher. Without one that is no fault.
        if launched():
            raise
