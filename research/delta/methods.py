"""What a delta method is: `init`, `apply` and, where it can be done, `merge`, `unmerge`, `scaled`, `penalty`.

A site method acts at a module's call, a leaf method on an array of the parameter tree. Methods are frozen
dataclasses whose fields are numbers and strings, so that a stored delta can name them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax

from ... import InputError

Variables = Mapping[str, Any]
Axes = Mapping[str, tuple[Literal["in", "out"] | None, ...]]


@dataclass(frozen=True)
class Site:
    """A module that a delta acts at, as its method sees it.

    `module` is there for its attributes, `params` are its own parameters (one layer's, inside a scan),
    `rng` is set where the call trains and was given one.
    """

    path: str
    module: nn.Module
    params: Variables
    rng: jax.Array | None = None
    train: bool = False


class SiteMethod(ABC):
    """A delta at a module's boundary: it sees the call's arguments and its outputs.

    `innermost` says that the method takes the site to compute what its kernel says, so that no other method
    may act there before it. `neutral` is a value for all its variables, state included, that changes
    nothing: layers of a scan outside the address get it.
    """

    name: ClassVar[str]
    positions: ClassVar[tuple[str, ...]]
    at: ClassVar[str] = "__call__"
    neutral: ClassVar[float] = 0.0
    innermost: ClassVar[bool] = False

    @property
    def axes(self) -> Axes:
        """How variables lie on a mesh: their axes as "in" or "out" of the site's kernel, None for neither."""
        return {}

    @property
    def random(self) -> bool:
        """Whether training needs a random key."""
        return False

    @property
    def reads(self) -> bool:
        """Whether `init` looks at the values of the site's parameters and not only at their shapes."""
        return False

    @abstractmethod
    def init(self, rng: jax.Array, site: Site, args: tuple, output: Any) -> Variables:
        """Trained variables of one layer; `args` and `output` of the site's call are shapes and dtypes."""

    def state(self, rng: jax.Array, site: Site, args: tuple, output: Any, trained: Variables) -> Variables:
        """Variables that are kept but not trained; `trained` is what `init` returned."""
        return {}

    @abstractmethod
    def apply(
        self, variables: Variables, site: Site, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """The site's new output; `call(*args, **kwargs)` is the site as it was.

        `variables` holds the trained ones and the state.
        """

    def merge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The site's parameters with the delta absorbed; stacked layers come with their leading axes."""
        raise InputError(
            f"{path}: {type(self).__name__} cannot be merged into the weights; "
            f"it is no linear map of its site's input"
        )

    def unmerge(self, variables: Variables, params: Variables, path: str) -> Variables:
        """The site's parameters before `merge`, up to rounding."""
        raise InputError(
            f"{path}: {type(self).__name__} cannot be taken out of merged weights; keep the parameters "
            f"from before the merge"
        )

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """Trained variables with `factor` times the effect on the site; `factor` may be traced.

        `variables` are the trained ones alone, stacked layers with their leading axes.
        """
        raise InputError(
            f"{type(self).__name__} cannot be scaled: its effect is linear in none of its variables"
        )

    def penalty(self, variables: Variables) -> Any:
        """What the method adds to the mean loss in training; variables may have leading axes."""
        return 0.0


class LeafMethod(ABC):
    """A delta on an array of the parameter tree: a re-parameterisation, so always mergeable.

    `replaces` says that nothing of the backbone's array remains. Variables `alike` are shaped as the array
    and lie on a mesh as it does.
    """

    name: ClassVar[str]
    positions: ClassVar[tuple[str, ...]]
    replaces: ClassVar[bool] = False
    alike: ClassVar[tuple[str, ...]] = ()

    @property
    def random(self) -> bool:
        """Whether training needs a random key."""
        return False

    def accepts(self, path: str) -> bool:
        """Whether the method acts on the leaf at `path`, among those that its address names."""
        return True

    @abstractmethod
    def init(self, rng: jax.Array, leaf: jax.Array) -> Variables:
        """Trained variables for `leaf`; rows of a stack come as one array."""

    def shared(self, rng: jax.Array) -> Variables:
        """Trained variables that all arrays of an entry have in common; `apply` gets them with its own."""
        return {}

    def state(self, rng: jax.Array, leaf: jax.Array, trained: Variables) -> Variables:
        """Variables that are kept but not trained; `trained` is what `init` returned."""
        return {}

    @abstractmethod
    def apply(self, variables: Variables, leaf: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The array that the model is given in place of `leaf`, of the same shape and dtype.

        `variables` holds the trained ones and the state; `rng` is set where the call trains and has one.
        """

    def unmerge(self, variables: Variables, leaf: jax.Array, path: str) -> jax.Array:
        """The array before it was merged, up to rounding."""
        raise InputError(
            f"{path}: {type(self).__name__} cannot be taken out of merged weights; keep the parameters "
            f"from before the merge"
        )

    def scaled(self, variables: Variables, factor: Any) -> Variables:
        """Trained variables with `factor` times the effect on the array; `factor` may be traced."""
        raise InputError(
            f"{type(self).__name__} cannot be scaled: its effect is linear in none of its variables"
        )

    def penalty(self, variables: Variables) -> Any:
        """What the method adds to the mean loss in training."""
        return 0.0


Method = SiteMethod | LeafMethod


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a module was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))
