"""Which blocks a kernel takes where nobody says otherwise."""

import jax

from ..biases import Bucketed, Dense
from ..block_sizes import block_sizes, found_fields
from ..relations import Relations
from ..request import Request
from .plan import LANES, Blocks

KERNELS = ("forward", "backward", "query gradient", "key gradients")  # "backward": one for q, k and v

# Worth a try. A step's own cost is no bundle, so no fewer pairs a tile than now; and scores of more than
# 2^20 pairs at once leave VMEM no room for the sums of a long sequence.
CANDIDATES = tuple(
    Blocks(rows, columns, chunk)
    for rows, columns in ((1024, 1024), (1024, 2048), (2048, 1024))
    for chunk in (256, 512, 1024)
    if rows * chunk <= 1 << 20 and columns <= 4 * chunk
)
_DEFAULT = Blocks(1024, 1024, 512)  # where the table has no entry
_SPREAD = Blocks(512, 512, 512)
_MOST_FUSED = 32 << 20  # bytes of VMEM for the gradient of q in the fused kernel; all of it is `VMEM_LIMIT`
_MOST = 4 << 20  # bytes of a block of a dense bias, which is held twice


def blocks_for(kernel: str, request: Request) -> Blocks:
    """Of one of the `KERNELS`: the entry of "tpu forward" or the like, smaller where a term needs room."""
    found = found_fields(request.dtype, request.width, request.mask)
    blocks = block_sizes(f"tpu {kernel}", length=max(request.queries, request.keys), **found)
    return _limited(_DEFAULT if blocks is None else Blocks(*blocks), request)


def fits_fused(repeats: int, queries: int, width: int, itemsize: int, request: Request) -> bool:
    """Whether the gradient of all queries of a key head fits: the sum in float32, and twice the result.

    `width` is padded to registers. Blocks of arrays with an element a pair leave half the room.
    """
    lanes = -(-width // LANES) * LANES
    pairs = any(len(x.shape) == 4 and x.shape[2] > 1 for x in jax.tree.leaves((request.mask, request.bias)))
    return repeats * queries * lanes * (4 + 2 * itemsize) <= _MOST_FUSED >> pairs


def _limited(blocks: Blocks, request: Request) -> Blocks:
    """Smaller where a group's heads, a dense bias or one spread from a table would need too much room."""
    repeats = request.heads // request.kv_heads
    rows = max(blocks.rows // max(1, repeats // 2), 128)
    if isinstance(request.bias, Bucketed | Relations):
        return Blocks(min(rows, _SPREAD.rows), *_SPREAD[1:])
    columns = blocks.columns
    if isinstance(request.bias, Dense) and request.bias.values.shape[1] > 1:
        while 4 * repeats * rows * columns > _MOST and max(rows, columns) > 128:
            rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return Blocks(rows, columns, min(blocks.chunk, columns))
