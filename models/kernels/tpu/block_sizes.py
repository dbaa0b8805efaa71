"""Which blocks a kernel takes where nobody says otherwise."""

from ..biases import Bucketed, Dense
from ..request import Request
from .plan import Blocks

# Chunks of 512 and 1024 keys cost a forward prototype 4033 and 4319 bundles a 1024 x 1024 tile on v5e, 2522
# and 2807 on v6e (width 128). The backward pass has the same, untried otherwise; nothing ran on a chip.
_FORWARD, _BACKWARD = Blocks(1024, 1024, 512), Blocks(1024, 1024, 512)
_TOEPLITZ = Blocks(512, 512, 512)
_MOST = 4 << 20  # bytes of a block of a dense bias, which is held twice


def forward_blocks(request: Request) -> Blocks:
    """Of the forward pass."""
    return _limited(_FORWARD, request)


def backward_blocks(request: Request) -> Blocks:
    """Of the gradients."""
    return _limited(_BACKWARD, request)


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
