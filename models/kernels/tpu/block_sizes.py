"""Which blocks a kernel takes where nobody says otherwise."""

import jax

from ..biases import Bucketed, Dense
from ..block_sizes import block_sizes, found_fields
from ..request import Request
from .plan import LANES, Blocks

# Where the table has no entry.
_FORWARD, _BACKWARD = Blocks(1024, 1024, 512), Blocks(1024, 1024, 512)
_TOEPLITZ = Blocks(512, 512, 512)
_MOST_FUSED = 32 << 20  # bytes of VMEM for the gradient of q in the fused kernel; all of it is `VMEM_LIMIT`
_MOST = 4 << 20  # bytes of a block of a dense bias, which is held twice


def forward_blocks(request: Request) -> Blocks:
    """Of the forward pass."""
    return _limited(_tuned("tpu forward", request) or _FORWARD, request)


def backward_blocks(request: Request) -> Blocks:
    """Of the gradients."""
    return _limited(_tuned("tpu backward", request) or _BACKWARD, request)


def _tuned(kernels: str, request: Request) -> Blocks | None:
    """What the table has, if it has an entry."""
    found = found_fields(request.dtype, request.width, request.mask)
    blocks = block_sizes(kernels, length=max(request.queries, request.keys), **found)
    return None if blocks is None else Blocks(*blocks)


def fits_fused(repeats: int, queries: int, width: int, itemsize: int, request: Request) -> bool:
    """Whether the gradient of all queries of a key head fits: the sum in float32, and twice the result.

    `width` is padded to registers. Blocks of arrays with an element a pair leave half the room.
    """
    lanes = -(-width // LANES) * LANES
    pairs = any(len(x.shape) == 4 and x.shape[2] > 1 for x in jax.tree.leaves((request.mask, request.bias)))
    return repeats * queries * lanes * (4 + 2 * itemsize) <= _MOST_FUSED >> pairs


def _limited(blocks: Blocks, request: Request) -> Blocks:
    """Smaller where the heads of a group, a dense bias or a Toeplitz matrix would need too much room."""
    repeats = request.heads // request.kv_heads
    rows = max(blocks.rows // max(1, repeats // 2), 128)
    if isinstance(request.bias, Bucketed):
        return Blocks(min(rows, _TOEPLITZ.rows), *_TOEPLITZ[1:])
    columns = blocks.columns
    if isinstance(request.bias, Dense) and request.bias.values.shape[1] > 1:
        while 4 * repeats * rows * columns > _MOST and max(rows, columns) > 128:
            rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return Blocks(rows, columns, min(blocks.chunk, columns))
