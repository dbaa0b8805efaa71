"""Attention for TPUs in Pallas: forward, and backward by two kernels and a third for the bias.

`implementation` is what the registry holds: padding and layout; `attend` joins the kernels, `forward`,
`gradients` and `bias_gradient`. Each walks along a list of live tiles (`call`, `..block_lists`). What
the terms of an attention say about a tile is in `scores`, from `masking`, `biases` (`toeplitz`) and
`dropping`, which read the `pieces` of arrays that the grid brings. `plan` and `block_sizes` cut the matrix.
"""

from .implementation import Tpu
from .plan import Blocks

__all__ = ["Blocks", "Tpu"]
