"""An order of positions in which devices that share a sequence share the work of a causal mask.

The idea is that of Zhu 2024 (zhuzilin/ring-flash-attention, `zigzag`) and of Llama 3.
"""

from typing import Literal

import numpy as np

from .. import InputError

Order = Literal["zigzag", "contiguous"]


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """The order in which to lay a sequence over devices so that a causal mask gives each the same work.

    Of 2n chunks device d holds number d and number 2n - 1 - d: `x[:, zigzag_order(T, n)]` is sharded in
    place of x, and `numpy.argsort` of the order brings results back. Raises InputError for a length that is
    no multiple of 2n.
    """
    if length % (2 * devices):
        raise InputError(f"a length of {length} is not a multiple of twice the {devices} devices")
    chunks = np.arange(length).reshape(2, devices, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)
