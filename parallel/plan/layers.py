"""What a model costs, as a table of layers: all that the planner knows of it.

Everything is per token of the computed sequence, in numbers, bytes or floating-point operations, for the
whole layer before anything is split. `modicum.research.planning.tables` makes the table of a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ... import InputError


@dataclass(frozen=True)
class Remat:
    """One way for a layer to bridge forward and backward pass.

    whole       bytes a token kept, which tensor parallelism does not split (it does with `sequence`)
    split       bytes a token kept, which it splits
    recomputed  floating-point operations a token that the backward pass does again
    reductions  sums over the tensor axis that it does again
    gathered    bytes a token kept, which every device keeps whole
    """

    name: str
    whole: float
    split: float
    recomputed: float
    reductions: float = 0.0
    gathered: float = 0.0

    def kept(self, tensor: int, sequence: bool) -> float:
        """Bytes a token that one device keeps."""
        return self.whole / (tensor if sequence else 1) + self.split / tensor + self.gathered


@dataclass(frozen=True)
class Layer:
    """One layer.

    parameters  numbers it holds, of which tensor parallelism splits `split_parameters`
    flops       operations of the forward pass a token
    stream      bytes a token of its output, which is what pipeline stages hand on and tensor parallelism sums
    reductions  sums over the tensor axis in the forward pass (the backward pass has as many)
    keys        bytes a token of keys and values, which context parallelism passes round
    traffic     bytes a token that the forward pass reads and writes outside matrix products
    whole, split  bytes a token in use at most while it is computed, not split and split over tensor
    most        bytes of a device that these take at most: what is more is computed in parts
    """

    name: str
    parameters: int
    split_parameters: int
    flops: float
    stream: float
    remats: tuple[Remat, ...]
    reductions: float = 0.0
    keys: float = 0.0
    traffic: float = 0.0
    whole: float = 0.0
    split: float = 0.0
    most: float = math.inf

    def __post_init__(self) -> None:
        if not self.remats:
            raise InputError(
                f"layer {self.name!r} has no way to keep its activations; give at least one Remat"
            )

    def held(self, tensor: int) -> float:
        """Numbers on each device when `tensor` devices share the layer."""
        return self.split_parameters / tensor + (self.parameters - self.split_parameters)

    def working(self, tensor: int, sequence: bool) -> float:
        """Bytes a token in use while it is computed."""
        return self.whole / (tensor if sequence else 1) + self.split / tensor


@dataclass(frozen=True)
class LayerTable:
    """A model: its layers in order, what stands before and after them, and what must divide.

    ends     layers outside the stack (embedding, head), computed once
    sizes    for each mesh axis the named sizes that it has to divide, such as {"tensor": {"heads": 96}}
    useful   operations a token of a step that count for MFU: forward and backward once, causal halves left
             out
    """

    name: str
    layers: tuple[Layer, ...]
    ends: tuple[Layer, ...]
    useful: float
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        return sum(layer.parameters for layer in (*self.layers, *self.ends))

    def refuse(self, axis: str, ways: int) -> str:
        """Why the model cannot be split so many ways over a mesh axis; empty where it can."""
        for name, size in self.sizes.get(axis, {}).items():
            if size % ways:
                return f"{axis}={ways} does not divide {name}={size}"
        return ""


@dataclass(frozen=True)
class Recipe:
    """Bytes that training holds for each parameter.

    parameter   what stays between steps;  compute: type of the products and of activations
    gradient    of the gradient's type;  optimizer: moments, and masters where `parameter` is no float32
    copied      whether the products need a copy of the parameters in another type
    """

    name: str
    parameter: float
    compute: float
    gradient: float
    optimizer: float
    copied: bool = False

    @property
    def total(self) -> float:
        """Bytes a parameter of everything that lives between or through steps."""
        return self.parameter + self.gradient + self.optimizer


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # modicum train --precision bf16 with AdamW: float32 parameters, gradients and moments, bfloat16
        # copies
        Recipe("modicum", 4, 2, 4, 8, copied=True),
        # Rajbhandari et al., "ZeRO", 2020, section 3.1: 16 bytes
        Recipe("mixed", 2, 2, 2, 12),
        # BMTrain's fp16 Adam: first moment in fp16 (research/openbmb.md 1.2): 14 bytes
        Recipe("bmtrain", 2, 2, 2, 10),
        # scaling-book training.md: bfloat16 parameters, float32 moments, gradients in bfloat16: 12 bytes
        Recipe("lean", 2, 2, 2, 8),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; raises InputError for an unknown one."""
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is unknown; valid: {', '.join(RECIPES)}")
    return RECIPES[name]
