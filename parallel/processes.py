"""Several processes as one run, through `jax.distributed`: XLA's own runtime, nothing of ours in between."""

from __future__ import annotations

import os

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
    jax.distributed.initialize(coordinator, count, index)


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process has to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _initialize_by_launcher() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError:
        # Devices are in use already, so JAX did not look for a launcher. Without one that is no fault.
        if any(variable in os.environ for variable in LAUNCHER_VARIABLES):
            raise
