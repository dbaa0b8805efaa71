"""Ways to tune, as subcommands of `modicum tune`. Imports no jax.

A row of `METHODS` is a subcommand: its options are the fields of the method in `research.delta` that it
names, with the same defaults. A test holds the two lists equal; this one makes `--help` instant.
"""

from __future__ import annotations

from dataclasses import field as dataclass_field
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union

import tyro

from .method_kinds import (
    EVERYTHING,
    AtRoot,
    Budgeted,
    FoldedAtRoot,
    FullTuning,
    LastLayers,
    LowRank,
    Prefixed,
    Probe,
    Pruned,
    Scales,
    SiteOrLeaf,
    TuningMethod,
)


class Option(NamedTuple):
    """A method's option: its default, what it is, its type where the default does not tell.

    `field` is the field of the delta method that it sets: of the same name unless given, and none for "-".
    """

    default: Any
    help: str = ""
    type: Any = None
    field: str = ""


def _method(
    command: str, doc: str, base: type[TuningMethod] = SiteOrLeaf, stored: str = "", **options: Any
) -> type[TuningMethod]:
    """The subcommand `command`, a frozen dataclass with these options."""
    found = {name: each if isinstance(each, Option) else Option(each) for name, each in options.items()}
    made = []
    for name, option in found.items():
        kind = option.type or type(option.default)
        shown = Annotated[kind, tyro.conf.arg(help=option.help)] if option.help else kind
        made.append((name, shown, dataclass_field(default=option.default)))
    own = {option.field or name: name for name, option in found.items() if option.field != NONE}
    namespace = {
        "command": command,
        "stored": stored or command.replace("-", "_"),
        "own": own,
        "__doc__": doc,
        "__module__": __name__,
    }
    title = "".join(part.capitalize() for part in command.split("-"))
    return make_dataclass(title, made, bases=(base,), frozen=True, namespace=namespace)


def _at(address: str) -> Option:
    where = "; empty: the whole model" if address == EVERYTHING else ""
    return Option(address, f"Address of what it acts on{where}.", field=NONE)


NONE = "-"
ATTENTION = _at("attention/(query|value)")
BOTTLENECKS = _at("(attention/output|mlp/down)")
ACTIVATION = Option("gelu", "gelu, relu, silu or tanh.")
RANK: dict[str, Any] = {
    "rank": 8,
    "alpha": Option(16.0, "The product is multiplied by alpha / rank."),
    "dropout": 0.0,
}
STABILISED = Option(False, "Divide alpha by the root of the rank (Kalajdzievski, 2023).")
B_RATE = Option(
    1.0, "B's learning rate over A's (LoRA+, Hayou et al., 2024, whose code suggests 16).", field=NONE
)
STARTS = Literal["uniform", "gaussian", "pissa", "olora"]

METHODS: tuple[type[TuningMethod], ...] = (
    _method(
        "lora",
        "Low-rank updates beside projections (Hu et al., 2022).",
        LowRank,
        **RANK,
        rank_stabilised=STABILISED,
        initialisation=Option("uniform", "How the two matrices start.", STARTS),
        b_rate=B_RATE,
        at=ATTENTION,
    ),
    _method(
        "dora",
        "Low-rank updates of a matrix's directions, and its columns' lengths (Liu et al., 2024).",
        LowRank,
        **RANK,
        rank_stabilised=STABILISED,
        b_rate=B_RATE,
        at=ATTENTION,
    ),
    _method(
        "adalora",
        "Low-rank updates that share a budget of ranks (Zhang et al., 2023).",
        Budgeted,
        rank=Option(12, "Every matrix's rank at the start."),
        alpha=16.0,
        dropout=0.0,
        orthogonality=0.01,
        target=Option(8, "Ranks a matrix in the end, on average.", field=NONE),
        initial=Option(0.1, "Share of the steps before any rank is taken away.", field=NONE),
        settled=Option(0.3, "Share of the steps at the end, when none is any more.", field=NONE),
        every=Option(1, "Steps between two looks at which ranks matter least.", field=NONE),
        at=_at("(attention/(query|key|value|output)|mlp/(up|gate|down))"),
    ),
    _method(
        "vera",
        "Trained vectors around random matrices that all layers share (Kopiczko et al., 2024).",
        rank=256,
        dropout=0.0,
        initial=0.1,
        matrix_seed=Option(0, "Seed of the random matrices.", field="seed"),
        at=ATTENTION,
    ),
    _method(
        "oft",
        "Rotations of what enters a projection (Qiu et al., 2023).",
        block_size=Option(32, "Numbers that are rotated together."),
        neumann_terms=Option(0, "Terms of the series for the inverse; 0: exact."),
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
        "compacter",
        "Bottleneck layers of sums of Kronecker products (Mahabadi et al., 2021).",
        reduction=Option(16, "How much narrower than the model the bottleneck is."),
        n=Option(4, "How many products; divides the widths."),
        rank=1,
        activation=ACTIVATION,
        shared_rule=Option(False, "One rule for both matrices."),
        learn_rule=Option(True, "Train the rule."),
        at=BOTTLENECKS,
    ),
    _method(
        "ia3",
        "Scales of keys, values and the neurons of the mlp (Liu et al., 2022).",
        Scales,
        inner=Option("mlp/down", "Address of what reads the neurons; empty: none.", field=NONE),
        at=_at("attention/(key|value)"),
    ),
    _method(
        "prefix",
        "Learned keys and values in front of those of attention (Li and Liang, 2021).",
        Prefixed,
        length=6,
        reparameterise=Option(0, "Width of the MLP that makes them in training; 0: none."),
        std=1.0,
        shift_positions=Option(False, "Count them as past tokens, as PEFT does.", field=NONE),
        at=_at("attention"),
    ),
    _method(
        "soft-prompt",
        "Learned vectors in front of the embedded tokens (Lester et al., 2021).",
        AtRoot,
        length=100,
        initialisation=Option("vocabulary", "", Literal["vocabulary", "uniform"]),
    ),
    _method(
        "prompt-encoder",
        "A prompt that a network makes in training: P-tuning (Liu et al., 2021).",
        FoldedAtRoot,
        length=100,
        kind=Option("mlp", "", Literal["mlp", "lstm"]),
        width=Option(0, "Of the network's hidden layers; 0: the model's."),
        layers=Option(2, "Of the LSTM."),
    ),
    _method("bitfit", "Biases only (Ben Zaken et al., 2022).", at=_at(EVERYTHING)),
    _method("layer-norm", "Scales and biases of normalisations only.", at=_at(EVERYTHING)),
    _method(
        "last-layers",
        "The last layers in full.",
        LastLayers,
        count=Option(1, "How many layers."),
    ),
    _method(
        "random-subset",
        "A random share of each array's numbers.",
        fraction=0.005,
        count=Option(None, "How many numbers of each array, in place of a share.", int | None),
        at=_at(EVERYTHING),
    ),
    _method(
        "diff-pruning",
        "A difference to the backbone that is made sparse (Guo et al., 2021).",
        Pruned,
        sparsity=Option(1.25e-7, "Weight of the expected number of differences in the loss."),
        start=Option(5.0, "Where the gates' logits start."),
        group=Option(False, "One more gate for each array."),
        keep=Option(0.005, "Share of the differences that is kept in the end.", field=NONE),
        at=_at(EVERYTHING),
    ),
    _method(
        "intrinsic",
        "All arrays moved by one short vector: SAID (Aghajanyan et al., 2021).",
        stored="said",
        dimension=1000,
        at=_at(EVERYTHING),
    ),
    _method("probe", "A linear classifier on the frozen model.", Probe),
    _method("full", "All parameters.", FullTuning),
)

if TYPE_CHECKING:
    Method = TuningMethod
else:
    Method = Union[tuple(Annotated[each, tyro.conf.subcommand(each.command)] for each in METHODS)]  # noqa: UP007
