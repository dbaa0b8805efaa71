"""What a run writes down and shows, fetched from the device only when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from ..study.records import MetricsLog
from .loss_scale import Scaling
from .metrics import Throughput
from .stopping import require_finite

Report = Callable[[int, Mapping[str, float]], None]


class Recorder:
    """Keeps metrics on the device until they are wanted, so that steps are dispatched without waiting.

    Nothing is evaluated or saved before every step so far was found finite.
    """

    def __init__(
        self, log: MetricsLog, report: Report | None, throughput: Throughput, scaling: Scaling
    ) -> None:
        self._log, self._report = log, report
        self._throughput, self._skips = throughput, scaling.dynamic
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Remember the metrics of `step`."""
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Wait for the pending steps, check them, and write them down with their mean rate."""
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        self._pending = []
        rates = self._throughput.read(sum(float(metrics["weight"]) for _, metrics in fetched))
        for step, metrics in fetched:
            require_finite(step, metrics, self._skips)
            values = {name: float(value) for name, value in metrics.items() if name != "finite"}
            self._log.append(step, values)
            if self._report:
                self._report(step, {**values, **rates})

    def evaluated(self, step: int, means: Mapping[str, float]) -> None:
        """Write down an evaluation; its time does not count as training."""
        self._log.append(step, {f"evaluation_{name}": value for name, value in means.items()})
        self.skip()

    def skip(self) -> None:
        """Leave out of the rate what was done since the last flush."""
        self._throughput.skip()
