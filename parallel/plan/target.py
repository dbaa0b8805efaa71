"""Devices to compile for that need not be there: a TPU slice by libtpu, GPUs by a description of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ... import InputError
from .topology import Topology

# Else libtpu asks the network which machine of a pod this is, and waits for an answer; and one process at a
# time may load it, as if there were a chip to share.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PLANAR = 2  # dimensions of a v5e's or v6e's name; the others' have three


def target_devices(topology: Topology, description: Path | None = None) -> list[Any]:
    """All devices of the topology, for `make_mesh`; `description` is XLA's of one GPU (a textproto).

    Raises InputError in one line where libtpu or the CUDA plugin is absent or does not know it.
    """
    if topology.chip.kind == "gpu":
        return _gpus(topology, description)
    return tpu_devices(f"{topology.chip.name}:{'x'.join(map(str, _named(topology)))}")


def tpu_devices(name: str) -> list[Any]:
    """Devices of a TPU topology by libtpu's name for it, such as `v5p:2x2x1`."""
    from jax.experimental import topologies

    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    options = (
        {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    )  # else v4's cores are devices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(found.devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"topology {name!r}: {reason}; with libtpu (pip install libtpu) v5p:2x2x1 is valid"
        ) from error


def _named(topology: Topology) -> tuple[int, ...]:
    dimensions = 3 if topology.chip.torus > PLANAR else PLANAR
    return topology.shape + (1,) * (dimensions - len(topology.shape))


def _gpus(topology: Topology, description: Path | None) -> list[Any]:
    from jax.experimental import topologies

    chip = topology.chip
    if description is None or not description.exists():
        raise InputError(
            f"chip {chip.name}: compiling for GPUs that are not there takes XLA's description of one; "
            f"there is one of h100"
        )
    hosts = max(1, topology.size // topology.host)
    shape = f"1x{hosts}x{topology.size // hosts}"
    try:
        found = topologies.get_topology_desc(
            "", platform="cuda", target_config=description.read_text(), topology=shape
        )
        return list(found.devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"topology {topology} of {chip.name}: {reason}; needs the plugin (pip install jax-cuda13-plugin)"
        ) from error
