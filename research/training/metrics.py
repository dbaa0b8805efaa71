"""Throughput, and what fraction of the device's arithmetic it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax

# Dense bfloat16 peak of one device in FLOP/s, by `device_kind` as JAX reports it. Makers' data sheets:
# NVIDIA V100, A100, H100 and H200 (half of the figure "with sparsity"); cloud.google.com/tpu/docs,
# system architecture pages of v4, v5e, v5p, v6e and 7x. A device that is not here has no MFU: a dash.
DENSE_PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def dense_peak(device_kind: str) -> float | None:
    """Peak FLOP/s of one device in dense bfloat16 products; None where it is not known."""
    return DENSE_PEAKS.get(device_kind)


class Throughput:
    """Units (tokens, examples) per second since the last reading, and MFU.

    MFU is model FLOPs (causal attention halved, recomputation not counted, see
    `models.costs.training_flops_per_token`) over the dense peak of all devices of the mesh. The first
    reading has no rate: compilation falls into it.
    """

    def __init__(
        self,
        unit: str,
        flops_per_unit: float | None,
        devices: Sequence[jax.Device],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        peaks = [dense_peak(device.device_kind) for device in devices]
        known = [peak for peak in peaks if peak]
        self._peak = sum(known) if len(known) == len(peaks) else None
        self._name, self._flops_per_unit = f"{unit}_per_second", flops_per_unit
        self._clock = clock
        self._since: float | None = None

    def read(self, units: float) -> dict[str, float]:
        """The rate and, where the peak is known, `mfu`, for `units` since the last reading or `skip`."""
        now, since = self._clock(), self._since
        self._since = now
        if since is None:
            return {}
        rate = units / max(now - since, 1e-9)
        if self._peak is None or self._flops_per_unit is None:
            return {self._name: rate}
        return {self._name: rate, "mfu": rate * self._flops_per_unit / self._peak}

    def skip(self) -> None:
        """Leave out the time since the last reading: an evaluation or a checkpoint."""
        if self._since is not None:
            self._since = self._clock()
