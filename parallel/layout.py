"""Layout: everything that decides where the arrays of a run lie, in one value."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from .. import InputError
from .batches import batch_sharding, fitting_rows, local_rows, place_batch, replicated
from .mesh import MeshShape, make_mesh
from .pipeline import Schedule
from .rules import DEFAULT_RULES, AxisRules, AxisTable, axis_names, make_spec, split_axes, ways
from .zero import (
    LEVELS,
    MINIMUM,
    Placement,
    gradient_shardings,
    optimizer_shardings,
    parameter_shardings,
)
from .zigzag import Order

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Mesh, axis rules and ZeRO level of a run; its methods say where each tree of arrays lies.

    The methods take abstract trees (`jax.eval_shape`: anything with `shape` and `dtype`) and the model's
    axis table, and return trees of NamedSharding of the same structure, for `jax.jit`, `jax.device_put` and
    restoring. A model without a table (None) trains over data and fsdp, which need no names.

    zero       0 to 3, see `modicum.parallel.zero`
    replicate  patterns of arrays copied whole to every device, where their sizes divide over nothing
    minimum    elements from which ZeRO splits an array
    schedule   of a pipeline's micro-batches, where the mesh has `pipe`
    order      of a batch's columns over `context`; "zigzag" is for causal models under `models.placement`
    """

    mesh: Mesh
    rules: AxisRules = DEFAULT_RULES
    zero: int = 0
    replicate: tuple[str, ...] = ()
    minimum: int = MINIMUM
    order: Order = "contiguous"
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if self.zero not in LEVELS:
            raise InputError(f"ZeRO level {self.zero!r}; the levels are 0, 1, 2, 3")
        if self.order not in ("contiguous", "zigzag"):
            raise InputError(f"order {self.order!r}; a batch's columns lie contiguous or zigzag")

    @classmethod
    def single(cls) -> Layout:
        """Everything on the first device: a run without parallelism."""
        return cls(make_mesh(MeshShape(), jax.local_devices()[:1]))

    def parameters(self, abstract: Any, table: AxisTable | None) -> Any:
        """Shardings of parameters, trained or frozen."""
        return parameter_shardings(abstract, self._names(abstract, table), self._placement)

    def gradients(self, abstract: Any, table: AxisTable | None) -> Any:
        """Shardings of the gradients of these parameters, for a constraint inside the step."""
        return gradient_shardings(abstract, self._names(abstract, table), self._placement)

    def optimizer(self, abstract_state: Any, abstract: Any, table: AxisTable | None) -> Any:
        """Shardings of the state of an optimizer (or an average) of these parameters."""
        return optimizer_shardings(abstract_state, abstract, self._names(abstract, table), self._placement)

    def state(self, abstract_state: Any, table: AxisTable | None, parameters: str = "trainable") -> Any:
        """Shardings of a whole train state, a NamedTuple, dataclass or dict.

        Its field `parameters` lies as parameters; whatever else has copies of the parameter tree (moments,
        averages) lies as optimizer state; counters and keys are copied.
        """
        abstract = _field(abstract_state, parameters)
        everything = self.optimizer(abstract_state, abstract, table)
        return _with_field(everything, parameters, self.parameters(abstract, table))

    def batch(self, abstract_batch: Any) -> Any:
        """Shardings of a batch: rows over the axes of the rule `batch`, length over context."""
        return jax.tree.map(
            lambda leaf: batch_sharding(self.mesh, len(leaf.shape), self.rules), abstract_batch
        )

    def place(self, batch: Any) -> Any:
        """Put this process's rows of a batch on the mesh, see `place_batch`."""
        return place_batch(batch, self.mesh, self.rules, self.order)

    def for_causal(self, length: int) -> Layout:
        """This layout with rows of `length` tokens in zigzag order, where `context` splits them and it can.

        A causal mask gives every device the same work then. Logs which order it is, and why.
        """
        devices = self.mesh.shape["context"]
        if devices == 1:
            return self
        if length % (2 * devices):
            logger.info("rows of %d tokens lie contiguous: no multiple of 2 x context=%d", length, devices)
            return self
        logger.info("rows of %d tokens lie in zigzag order over context=%d", length, devices)
        return replace(self, order="zigzag")

    def local_rows(self, rows: int) -> slice:
        """Which rows of a global batch this process provides, see `modicum.parallel.local_rows`."""
        return local_rows(rows, self.mesh, self.rules)

    def fitting_rows(self, rows: int) -> int:
        """The smallest number of rows, from `rows` up, that divides over the mesh."""
        return fitting_rows(rows, self.mesh, self.rules)

    def for_layers(self, layers: int) -> Layout:
        """This layout for `layers` scanned layers: copied where `pipe` does not divide them, and logged.

        The stages are then filled up with layers that do nothing.
        """
        axes = split_axes(self.rules.mesh_axes("layers"), self.mesh)
        parts = ways(self.mesh, axes)
        if layers % parts == 0:
            return self
        logger.info("%d layers do not divide over %s=%d: copied", layers, "×".join(axes), parts)
        return replace(self, rules=self.rules.replace(layers=None))

    def activations(self, x: jax.Array, spread: str | None = None) -> jax.Array:
        """`x [B, T, ...]`, in a traced function, held where the batch lies: a device computes its own rows.

        ZeRO may split a parameter over the axes that split the rows. At such a parameter's use the
        partitioner has to gather the one or move the other, and does not always choose well: one such
        constraint, on the embedded tokens, decides it. `spread` is a logical axis over whose mesh axes T is
        split as well (`heads`: sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198). Mesh axes
        that do not divide B or T are left out; inside a `shard_map` so are those that it splits.
        """
        around = jax.sharding.get_abstract_mesh()
        manual = () if around.empty else around.manual_axes
        if self.mesh.size == 1 or len(manual) == len(self.mesh.axis_names):
            return x
        entries = []
        for names, size in zip((("batch",), ("length", *filter(None, [spread]))), x.shape):
            over = [axis for name in names for axis in self.rules.mesh_axes(name)]
            axes = [axis for axis in split_axes(over, self.mesh) if axis not in manual]
            while axes and size % ways(self.mesh, axes):
                axes.pop()
            entries.append(tuple(axes))
        where = NamedSharding(around if manual else self.mesh, make_spec(entries))
        return jax.lax.with_sharding_constraint(x, where)

    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds whole."""
        return replicated(self.mesh)

    def _names(self, abstract: Any, table: AxisTable | None) -> Any:
        if table is not None:
            return axis_names(abstract, table)
        split = [axis for axis in ("tensor", "expert") if self.mesh.shape[axis] > 1]
        if split:
            raise InputError(
                f"mesh axis {split[0]}={self.mesh.shape[split[0]]}: the model has no axis table to split by; "
                f"give one, or use data and fsdp"
            )
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), abstract)

    @property
    def _placement(self) -> Placement:
        return Placement(self.mesh, self.rules, self.zero, self.replicate, self.minimum)


def _field(state: Any, name: str) -> Any:
    return state[name] if isinstance(state, dict) else getattr(state, name)


def _with_field(state: Any, name: str, value: Any) -> Any:
    if isinstance(state, dict):
        return {**state, name: value}
    return state._replace(**{name: value}) if hasattr(state, "_replace") else state.replace(**{name: value})
