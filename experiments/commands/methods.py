"""Ways to tune, as subcommands of `modicum tune`. Imports no jax.

A row of `METHODS` is a subcommand: its options are the fields of the method in `research.delta` that it
names, with the same defaults. A test holds the two lists equal; this one makes `--help` instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Union

import tyro

from ... import InputError

if TYPE_CHECKING:
    from ...research.delta import Spec

HEAD = "classifier"
EVERYTHING = ""
NOT_HEAD = f"re:(?!{HEAD}(/|$)).+"
"""The whole model under a classifier: that is tuned in full whatever the method."""


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune; `command` is its name on the command line, `stored` that of its delta."""

    command: ClassVar[str] = ""
    stored: ClassVar[str] = ""

    def check(self) -> None:
        """Raise `InputError` for numbers that the method does not take."""

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec | None:
        """What is tuned of `params`, with the classifier's head where there is one; None: everything."""
        raise NotImplementedError


class SiteOrLeaf(TuningMethod):
    """One delta method at one address."""

    at: str

    def check(self) -> None:
        """Make the method: it looks at its numbers."""
        self.method()

    def method(self) -> Any:
        """The delta method with these options."""
        from ...research.delta import METHODS as stored_methods

        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "at"}
        return stored_methods[self.stored](**own)

    def spec(self, params: Mapping[str, Any], classifies: bool) -> Spec:
        """The delta, and the classifier's head."""
        address = NOT_HEAD if classifies and self.at == EVERYTHING else self.at
        return {address: self.method(), **_head(classifies)}


class LastLayers(TuningMethod):
    """The last layers in full."""

    count: int

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


class Option(NamedTuple):
    """A method's option: its default, what it is, and its type where the default does not tell."""

    default: Any
    help: str = ""
    type: Any = None


def _method(
    command: str, doc: str, base: type[TuningMethod] = SiteOrLeaf, stored: str = "", **options: Any
) -> type[TuningMethod]:
    """The subcommand `command`, a frozen dataclass with these options."""
    own = []
    for name, given in options.items():
        option = given if isinstance(given, Option) else Option(given)
        kind = option.type or type(option.default)
        shown = Annotated[kind, tyro.conf.arg(help=option.help)] if option.help else kind
        own.append((name, shown, dataclass_field(default=option.default)))
    title = "".join(part.capitalize() for part in command.split("-"))
    names = {"command": command, "stored": stored or command.replace("-", "_"), "__doc__": doc}
    names["__module__"] = __name__
    return make_dataclass(title, own, bases=(base,), frozen=True, namespace=names)


def _at(address: str) -> Option:
    where = "; empty: the whole model" if address == EVERYTHING else ""
    return Option(address, f"Address of what it acts on{where}.")


ATTENTION = _at("attention/(query|value)")
BOTTLENECKS = _at("(attention/output|mlp/down)")
ACTIVATION = Option("gelu", "gelu, relu, silu or tanh.")
RANK: dict[str, Any] = {
    "rank": 8,
    "alpha": Option(16.0, "The product is multiplied by alpha / rank."),
    "dropout": 0.0,
}
STABILISED = Option(False, "Divide alpha by the root of the rank (Kalajdzievski, 2023).")
STARTS = Literal["uniform", "gaussian", "pissa", "olora"]

METHODS: tuple[type[TuningMethod], ...] = (
    _method(
        "lora",
        "Low-rank updates beside projections (Hu et al., 2022).",
        **RANK,
        rank_stabilised=STABILISED,
        initialisation=Option("uniform", "How the two matrices start.", STARTS),
        at=ATTENTION,
    ),
    _method(
        "dora",
        "Low-rank updates of a matrix's directions, and its columns' lengths (Liu et al., 2024).",
        **RANK,
        rank_stabilised=STABILISED,
        at=ATTENTION,
    ),
    _method(
        "adapter",
        "Bottleneck layers after attention and mlp (Houlsby et al., 2019).",
        width=24,
        activation=ACTIVATION,
        at=BOTTLENECKS,
    ),
    _method(
        "parallel-adapter",
        "Bottleneck layers beside attention and mlp (He et al., 2022).",
        width=24,
        activation=ACTIVATION,
        scale=1.0,
        at=_at("(attention|mlp)"),
    ),
    _method(
        "low-rank-adapter",
        "Bottleneck layers whose matrices are low-rank products.",
        reduction=Option(32, "How much narrower than the model the bottleneck is."),
        rank=1,
        activation=ACTIVATION,
        at=BOTTLENECKS,
    ),
    _method(
        "ia3",
        "Scales of keys and values (Liu et al., 2022).",
        on=Option("output", "Scale the output or the input.", Literal["output", "input"]),
        at=_at("attention/(key|value)"),
    ),
    _method(
        "prefix",
        "Learned keys and values in front of those of attention (Li and Liang, 2021).",
        length=6,
        reparameterise=Option(0, "Width of the MLP that makes them in training; 0: none."),
        std=1.0,
        at=_at("attention"),
    ),
    _method(
        "bitfit",
        "Biases only (Ben Zaken et al., 2022).",
        at=_at(EVERYTHING),
    ),
    _method(
        "layer-norm",
        "Scales and biases of normalisations only.",
        at=_at(EVERYTHING),
    ),
    _method(
        "last-layers",
        "The last layers in full.",
        base=LastLayers,
        count=Option(1, "How many layers."),
    ),
    _method(
        "random-subset",
        "A random share of each array's numbers.",
        fraction=0.005,
        count=Option(None, "How many numbers of each array, in place of a share.", int | None),
        at=_at(EVERYTHING),
    ),
    _method("probe", "A linear classifier on the frozen model.", base=Probe),
    _method("full", "All parameters.", base=FullTuning),
)
BY_COMMAND = {each.command: each for each in METHODS}

if TYPE_CHECKING:
    Method = TuningMethod
else:
    Method = Union[tuple(Annotated[each, tyro.conf.subcommand(each.command)] for each in METHODS)]  # noqa: UP007
