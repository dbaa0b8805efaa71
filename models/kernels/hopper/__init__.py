"""Flash attention for Hopper GPUs (H100, H200), written in Pallas for Mosaic GPU.

`implementation` says what it can do, `padding` pads; `attend` is the differentiable function; `forward`,
`query_gradient` and `key_gradient` are its kernels, made of `ring` (copies ahead of use), `masking` and
`tiling` (which tiles), `scores` (one tile's arithmetic) and `operations` (what the GPU's own units do).
"""

from .implementation import Hopper as Hopper
