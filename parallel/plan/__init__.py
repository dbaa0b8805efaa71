"""What fits on what, how fast it is, and why: plans by dynamic programming under a memory budget.

It knows no model: it is given a table of layers (`layers.py`), which `modicum.research.planning` makes.

    chips.py     what the chips can do, each number with its source
    topology.py  how they are joined: bytes/s of a collective over each mesh axis
    layers.py    the table of layers: parameters, operations, bytes, ways to recompute
    memory.py    bytes on a device by kind
    costs.py     seconds of a step by kind and mesh axis
    dynamic.py   remat of each layer under a budget: a Pareto front over layers
    chain.py     the optimal order of recomputation on a chain (rotor)
    refusals.py  why nothing fits or divides
    search.py    mesh, ZeRO level, micro-batch around it; the smallest slice
    target.py    devices to compile for that need not be there
    hlo.py       the text of a compiled program, and how often its loops go round
    walk.py      what such a program computes, moves and sends (products.py, traffic.py, groups.py)
"""

from .chain import Chain
from .chips import CHIPS, Chip, chip
from .costs import Assumptions, Job, StepTime, communication_bytes, step_time
from .dynamic import Frontier, Option, frontier
from .layers import RECIPES, Layer, LayerTable, Recipe, Remat, recipe
from .memory import Memory, Split, fixed_memory
from .search import Plan, Search
from .topology import Topology, smaller_slices

__all__ = [
    "CHIPS",
    "RECIPES",
    "Assumptions",
    "Chain",
    "Chip",
    "Frontier",
    "Job",
    "Layer",
    "LayerTable",
    "Memory",
    "Option",
    "Plan",
    "Recipe",
    "Remat",
    "Search",
    "Split",
    "StepTime",
    "Topology",
    "chip",
    "communication_bytes",
    "fixed_memory",
    "frontier",
    "recipe",
    "smaller_slices",
    "step_time",
]
