"""How large the tiles of each Hopper kernel are: what a caller asks for, else the table's, else constants.

The constants are as large as registers allow (docs/results/attention_hopper_compiled.md); what is left to
tune is how many tiles are copied ahead and, forward, how many keys a tile has. The table,
`block_sizes.json`, knows no biases, dense masks or dropout: attention with any of them has the constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .... import InputError
from ..biases import ALiBi, Bias
from ..block_sizes import block_sizes, found_fields
from ..masks import Mask
from ..request import Request
from ..terms import Terms
from .dense_masks import split
from .problem import CONSUMERS, Problem, Tiles

NAMES = {
    "forward": "hopper forward",
    "query_gradient": "hopper query gradient",
    "key_gradient": "hopper key gradient",
}
"""What the kernels of a plan are called in the table; their blocks are queries, keys and stages."""

Asked = tuple[tuple[str, tuple[int, ...]], ...]


class Plan(NamedTuple):
    """Tile sizes of each kernel."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles
    bias_gradient: Tiles
    deterministic: bool = True  # else one kernel adds to the gradient of queries in any order


def plan(problem: Problem, terms: Terms, deterministic: bool = True, asked: Asked = ()) -> Plan:
    """Of one attention; `asked` are names and blocks as in the table.

    Raises InputError for blocks of which no kernel can be made.
    """
    dense = bool(split(terms.mask)[0])
    found = constants(problem.width, terms.bias, deterministic, dense, problem.rate > 0)
    simple, changed = _simple(terms.mask, terms.bias, problem.rate), dict[str, Any]()
    for field, name in NAMES.items():
        blocks = dict(asked).get(name) or (_from_table(name, problem, terms.mask) if simple else None)
        if blocks is not None:
            changed[field] = _checked(name, blocks)
    return found._replace(**changed)


def constants(
    width: int, bias: Bias | None, deterministic: bool = True, dense: bool = False, dropped: bool = False
) -> Plan:
    """After what tokamax's autotuning found for its like kernels on an H100.

    tokamax (openxla/tokamax), tuning tables of its Mosaic GPU flash attention. Larger tiles than these spill
    registers, or with those of a bias exceed shared memory: docs/results/attention_hopper_compiled.md.
    """
    narrow, read = width <= 64, bias is not None and not isinstance(bias, ALiBi)
    both = read and dense  # tiles of a bias and of a mask
    forward = Tiles(64, 64 if bias is not None or dense else 128, 4 if narrow and not both else 2)
    stages = 2 if both or (read and not narrow) else 3
    backward = Tiles(64, 64, 1 if both and dropped and not narrow else stages)  # two lack 48 bytes
    return Plan(forward, backward, backward, Tiles(64, 64, 3 if narrow else 2), deterministic)


def candidates(request: Request) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By name of entries in the table what is worth a try for a request, the constants first."""
    if request.bias is not None or not _simple(request.mask, None, request.dropout):
        return {}
    narrow = max(request.width, request.value_width) <= 64
    more = ((64, 128, 3), (64, 128, 2)) if narrow else ((64, 64, 4), (64, 64, 3))
    first = constants(64 if narrow else 128, None).forward
    backward = ((64, 64, 3), (64, 64, 2), (64, 64, 4))
    forward = ((first.queries, first.keys, first.stages), *more)
    return dict(zip(NAMES.values(), (forward, backward, backward)))


def _simple(mask: Mask, bias: Bias | None, rate: float) -> bool:
    return bias is None and not rate and not split(mask)[0]


def _from_table(name: str, problem: Problem, mask: Mask) -> tuple[int, ...] | None:
    fields = found_fields(problem.dtype.name, problem.width, mask)
    return block_sizes(name, length=max(problem.queries, problem.keys), **fields)


def _checked(name: str, blocks: tuple[int, ...]) -> Tiles:
    """A warpgroup has 64 rows; tiles divide what lengths are padded to, and are multiples of 64."""
    keys = (64, 64 * CONSUMERS) if name == NAMES["forward"] else (64,)
    if len(blocks) != 3 or blocks[0] != 64 or blocks[1] not in keys or blocks[2] < 1:
        valid = " or ".join(map(str, keys))
        raise InputError(f"{name} has blocks {list(blocks)}; they must be [64, {valid}, stages]")
    return Tiles(*blocks)
