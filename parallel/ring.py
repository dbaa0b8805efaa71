"""A fold over the devices of a mesh axis: the parts go round in a ring, and each device meets them all.

Liu et al. 2023, "Ring attention with blockwise transformers for near-infinite context", is the use that
gave it its name; nothing here knows of attention. A part is sent on before the work on it begins, and the
work does not wait for what arrives: one buffer is computed on while the other is filled.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax

Total = TypeVar("Total")
Part = TypeVar("Part")
Tree = Any


def ring_fold(
    step: Callable[[Part, Array], tuple[Any, Tree]],
    merge: Callable[[Total, Any], Total],
    total: Total,
    part: Part,
    axis: str,
    home: Tree = None,
) -> tuple[Total, Tree]:
    """Merge into `total` what `step` makes of the part of every device along `axis`; inside `shard_map`.

    `step(part, origin)` gives what stays here, which `merge(total, stays)` takes in, the own part's first,
    then that of the device before, and so on round; and what goes home with the part, a tree like `home`
    (None for nothing), which is added up over the devices and returned where the part came from. `total`,
    `part` and `home` vary over `axis`. Every part is sent n - 1 times, `home` n + 1 times.
    """
    devices = lax.axis_size(axis)
    here = lax.axis_index(axis)

    def turn(i: Any, total: Total, part: Part, home: Tree) -> tuple[Total, Tree]:
        arrived = _pass_on(home, axis)  # what the device before added to the part that is here now
        stays, goes = step(part, (here - i) % devices)
        return merge(total, stays), jax.tree.map(lax.add, arrived, goes)

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        total, part, home = carry
        coming = _pass_on(part, axis)
        total, home = turn(i, total, part, home)
        return (total, coming, home), None

    (total, part, home), _ = lax.scan(body, (total, part, home), jax.numpy.arange(devices - 1))
    total, home = turn(devices - 1, total, part, home)
    return total, _pass_on(home, axis)


def _pass_on(tree: Tree, axis: str) -> Tree:
    """Each device's arrays to the next one."""
    devices = lax.axis_size(axis)
    to_next = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, to_next), tree)
