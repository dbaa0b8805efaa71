"""What a subcommand of `modicum tune` does with its options: a specification, and what goes with it.

`methods` has the subcommands; each is made of one of these classes and a list of options. Imports no jax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ... import InputError

if TYPE_CHECKING:
    from ...research.delta import Spec
    from ...research.training.job import Wrap
    from ...research.training.tuning import Settle

HEAD = "classifier"
EVERYTHING = ""
NOT_HEAD = f"re:(?!{HEAD}(/|$)).+"
"""The whole model under a classifier: that is tuned in full whatever the method."""


@dataclass(frozen=True)
class TuningMethod(ABC):
    """A way to tune; `command` is its name on the command line, `stored` that of its delta."""

    command: ClassVar[str] = ""
    stored: ClassVar[str] = ""

    def check(self, steps: int, averaged: bool = False) -> None:
        """Raise `InputError` for numbers that the method does not take in a run of so many steps.

        `averaged`: what is stored is the moving average of the steps' parameters.
        """
        if averaged and self.best_from(steps) > 0:
            raise InputError(
                f"--ema does not go with {self.command}: an average keeps a share of what is set to zero"
            )

    @abstractmethod
    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec | None:
        """What is tuned of `params`, with the classifier's head where there is one; None: everything."""

    def best_from(self, steps: int) -> int:
        """The first of so many steps whose state may be the one that is stored."""
        return 0

    @property
    def wrap(self) -> Wrap | None:
        """What it adds to the optimizer."""
        return None

    @property
    def settle(self) -> Settle | None:
        """What it makes of a trained delta before that is measured and stored."""
        return None


class SiteOrLeaf(TuningMethod):
    """One delta method at one address."""

    at: str
    own: ClassVar[Mapping[str, str]] = {}

    def check(self, steps: int, averaged: bool = False) -> None:
        """Make the method: it looks at its numbers."""
        super().check(steps, averaged)
        self.method()

    def method(self) -> Any:
        """The delta method with these options."""
        from ...research.delta import METHODS as stored_methods

        return stored_methods[self.stored](**{name: getattr(self, ours) for name, ours in self.own.items()})

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The delta, and the classifier's head."""
        return {self.address(classifies): self.method(), **_head(classifies)}

    def address(self, classifies: bool) -> str:
        """Where it acts; arrays of a classifier's head are not its own."""
        return NOT_HEAD if classifies and self.at == EVERYTHING else self.at


class AtRoot(SiteOrLeaf):
    """A delta method at the model's root."""

    def address(self, classifies: bool) -> str:
        """The root module."""
        return ""


class LowRank(SiteOrLeaf):
    """LoRA and DoRA, whose B may learn faster than their A."""

    b_rate: float

    def check(self, steps: int, averaged: bool = False) -> None:
        """Make the method, and what multiplies B's updates."""
        super().check(steps, averaged)
        if self.wrap is not None:
            self.wrap(_no_optimizer(), steps)

    @property
    def wrap(self) -> Wrap | None:
        """LoRA+, where B's rate is another than A's."""
        return None if self.b_rate == 1 else self._faster

    def _faster(self, optimizer: Any, steps: int) -> Any:
        import optax

        from ...research.training.lora_plus import lora_plus

        return optax.chain(optimizer, lora_plus(self.b_rate))


class Budgeted(SiteOrLeaf):
    """AdaLoRA, of whose ranks the least important are taken away on the way."""

    target: int
    initial: float
    settled: float
    every: int

    def check(self, steps: int, averaged: bool = False) -> None:
        """Make the method and its budget."""
        super().check(steps, averaged)
        self.wrap(_no_optimizer(), steps)

    def best_from(self, steps: int) -> int:
        """The first step in which no more ranks are left than the budget has."""
        return steps - self._final(steps) + 1

    @property
    def wrap(self) -> Wrap:
        """The optimizer after whose updates the budget is kept."""
        return self._kept

    def _kept(self, optimizer: Any, steps: int) -> Any:
        from ...research.training.rank_allocation import rank_allocation

        return rank_allocation(
            optimizer,
            target=self.target,
            steps=steps,
            warmup=round(self.initial * steps),
            final=self._final(steps),
            every=self.every,
        )

    def _final(self, steps: int) -> int:
        return max(1, round(self.settled * steps))


class Folded(SiteOrLeaf):
    """A prefix or prompt that a network makes in training; what it makes is stored."""

    @property
    def settle(self) -> Settle | None:
        """The network's output in its place."""
        from ...research.delta import folded

        return folded if getattr(self, "reparameterise", 1) else None


class FoldedAtRoot(AtRoot, Folded):
    """The same at the model's root."""


class Prefixed(Folded):
    """A prefix, of which the model's positions may know."""

    length: int
    shift_positions: bool

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The prefix, the shift where it is asked for, and the classifier's head."""
        from ...research.delta import ShiftPositions

        shift: Spec = {"": ShiftPositions(self.length)} if self.shift_positions else {}
        return {**shift, **super().spec(params, classifies)}


class Pruned(SiteOrLeaf):
    """Diff pruning, of whose differences the largest are kept in the end."""

    keep: float

    def check(self, steps: int, averaged: bool = False) -> None:
        """Make the method."""
        super().check(steps, averaged)
        if not 0.0 < self.keep <= 1.0:
            raise InputError(f"diff pruning keep={self.keep} must be above 0 and at most 1")

    @property
    def settle(self) -> Settle:
        """The largest differences alone."""
        from ...research.delta import project

        return lambda tuned, variables: project(tuned, variables, self.keep)


class Scales(SiteOrLeaf):
    """IA3 on keys and values, and on the neurons inside the mlp."""

    inner: str

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The scales, and the classifier's head."""
        from ...research.delta import ia3_spec

        spec = ia3_spec(self.at, self.inner or "mlp/down")
        return {**(spec if self.inner else {self.at: self.method()}), **_head(classifies)}


class LastLayers(TuningMethod):
    """The last layers in full."""

    count: int

    def check(self, steps: int, averaged: bool = False) -> None:
        """There is one layer at least."""
        if self.count < 1:
            raise InputError(f"last-layers count={self.count} must be at least 1")

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The last layers of each stack, and the classifier's head."""
        from ...research.delta.last_layers import last_layers

        return {**last_layers(params, self.count), **_head(classifies)}


class Probe(TuningMethod):
    """A linear classifier on the frozen model."""

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The classifier's head alone."""
        if not classifies:
            raise InputError("probe trains a classifier's head, which text-to-text has not; choose a delta")
        return _head(classifies)


class FullTuning(TuningMethod):
    """All parameters."""

    def spec(self, params: Mapping[str, Any], classifies: bool) -> None:
        """No delta: the loop trains the parameters themselves."""
        return None


def _head(classifies: bool) -> Spec:
    from ...research.delta import Full

    return {HEAD: Full()} if classifies else {}


def _no_optimizer() -> Any:
    import optax

    return optax.identity()
