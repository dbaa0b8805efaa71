"""LoRA, rank-stabilised LoRA, PiSSA, OLoRA and DoRA as PEFT stores them.

`lora_A.weight` is `[r, in]`, `lora_B.weight` `[out, r]`, `lora_magnitude_vector` `[out]`. In a module that is
several of ours, each of ours gets A and its own rows of B; back, equal A's are stored once, others are
stacked: A's above each other, B's as blocks on a diagonal, the rank the sum of ranks. Both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from .... import InputError
from ..dora import DoRA
from ..lora import LoRA
from ..methods import Method
from ..trees import node_at
from .config import Config, by_pattern, most_common
from .files import PREFIX, Tensors
from .modules import Base, Module, Part
from .places import Delta, Deltas

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
STARTS = {True: "uniform", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
# How these start leaves the base model's weights as they were, so it does not matter to what is stored.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
CONVERT = "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a plain LoRA of it"


@dataclass(frozen=True)
class Product:
    """`scale * a @ b` at one of our modules, with DoRA's magnitude: a `[in, r]`, b `[r, out]`."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


class LoRACodec:
    """`peft_type: LORA`."""

    kind: ClassVar[str] = "LORA"
    methods: ClassVar[tuple[type[Method], ...]] = (LoRA, DoRA)
    suffixes: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE)

    def read(self, config: Config, found: Mapping[str, Tensors], base: Base) -> Deltas:
        """The deltas of our modules; raises `InputError` for variants that PEFT has and we have not."""
        rank, alpha = config.take("r", 8), float(config.take("lora_alpha", 8.0))
        ranks, alphas = config.take("rank_pattern", {}), config.take("alpha_pattern", {})
        stabilised, dropout = config.take("use_rslora", False), float(config.take("lora_dropout", 0.0))
        weighted = config.take("use_dora", False)
        start = config.take("init_lora_weights", None)
        if start not in (*PLAIN_STARTS, *STARTS):
            raise InputError(
                f"{config.path}: init_lora_weights={start!r} changes the base model's weights in a way that "
                f"is not stored; {CONVERT}"
            )
        config.require("bias", "none")
        # For other kinds of parallelism, and for a start that is over.
        config.ignore("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying")
        deltas = Deltas()
        for name, tensors in found.items():
            module = base.modules[name]
            a, b, magnitude = _checked(module, tensors, by_pattern(ranks, name, rank), weighted)
            width, own = a.shape[1], float(by_pattern(alphas, name, alpha))
            scale = own / math.sqrt(width) if stabilised else own / width
            if start in PLAIN_STARTS:
                parts = split(module, Product(a, b, scale, magnitude), base)
            elif module.fused:
                raise InputError(
                    f"{name}: {start} of a fused matrix has no form in its parts ({_paths(module)}): its "
                    f"start is the whole's; {CONVERT}"
                )
            else:
                parts = {module.parts[0].path: Product(a, b[:, module.parts[0].columns], scale)}
            for path, part in parts.items():
                count = part.a.shape[1]
                exact = own if count == width else tidy(_alpha(part.scale, count, stabilised))
                deltas[path] = _delta(part, count, exact, dropout, stabilised, STARTS.get(start, "uniform"))
        return deltas

    def write(self, deltas: Deltas, base: Base) -> tuple[dict[str, Any], Tensors]:
        """The keys of the configuration and the tensors, by name; raises `InputError` for mixed kinds."""
        methods: list[Any] = [delta.method for delta in deltas.values()]
        if len({(isinstance(method, DoRA), method.dropout) for method in methods}) > 1:
            raise InputError("PEFT has one dropout and one of LoRA and DoRA in an adapter; save them apart")
        weighted, stabilised = isinstance(methods[0], DoRA), all(each.rank_stabilised for each in methods)
        tensors, ranks, alphas = Tensors(), {}, {}
        for name, module in base.modules.items():
            own = {part.path: deltas[part.path] for part in module.parts if part.path in deltas}
            if not own:
                continue
            product, alpha = joined(module, own, weighted, stabilised, base)
            ranks[name], alphas[name] = product.a.shape[1], alpha
            tensors |= {f"{PREFIX}{name}.{A}": product.a.T, f"{PREFIX}{name}.{B}": product.b.T}
            if product.magnitude is not None:
                tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = product.magnitude
        rank, alpha = most_common(ranks.values()), most_common(alphas.values())
        keys = {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": methods[0].dropout,
            "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
            "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
            "target_modules": sorted(ranks),
            "fan_in_fan_out": any(base.modules[name].fan_in_fan_out for name in ranks),
            "use_rslora": stabilised,
            "use_dora": weighted,
        }
        return keys, tensors


def split(module: Module, product: Product, base: Base) -> dict[str, Product]:
    """A product at one of their modules as products at ours.

    Ours get all of A, or, where every component writes into one of ours only, their own components.
    """
    touched = np.stack([(product.b[:, part.columns] != 0).any(1) for part in module.parts])
    owners, parts = touched.argmax(0), {}
    apart = module.fused and (touched.sum(0) == 1).all() and (np.diff(owners) >= 0).all()
    for index, part in enumerate(module.parts):
        b = columns_of(product.b, part)
        magnitude = None if product.magnitude is None else columns_of(product.magnitude, part)
        own = owners == index if apart else np.full(len(owners), True)
        if apart and not own.any():
            if magnitude is None or np.allclose(magnitude, norms(base, part), rtol=1e-6):
                continue
            own = np.full(len(owners), True)
        parts[part.path] = Product(product.a[:, own], b[own], product.scale, magnitude)
    return parts


def joined(
    module: Module, own: Mapping[str, Delta], weighted: bool, stabilised: bool, base: Base
) -> tuple[Product, float]:
    """Our deltas at one of their modules as one product, and its alpha."""
    products = {path: product_of(delta) for path, delta in own.items()}
    given = list(products.values())
    first: Any = next(iter(own.values())).method
    if len(given) == len(module.parts) and all(_alike(each, given[0]) for each in given):
        a, scale, stacked = given[0].a, given[0].scale, False
    else:
        a, stacked = np.concatenate([each.a for each in given], 1), True
        scale = given[0].scale if len({each.scale for each in given}) == 1 else 1.0
    b = np.zeros((a.shape[1], module.outputs), a.dtype)
    magnitude = np.zeros(module.outputs, a.dtype) if weighted else None
    begin = 0
    for part in module.parts:
        product, real = products.get(part.path), part.columns >= 0
        if product is not None:
            rows = slice(begin, begin + product.a.shape[1]) if stacked else slice(None)
            factor = 1 if product.scale == scale else np.asarray(product.scale / scale, b.dtype)
            b[rows, part.columns[real]] = (product.b * factor)[:, real]
            begin += product.a.shape[1]
        if magnitude is not None:
            values = norms(base, part) if product is None else product.magnitude
            assert values is not None
            magnitude[part.columns[real]] = values[real]
    rank = a.shape[1]
    same = rank == first.rank and stabilised == first.rank_stabilised and scale == first.scale
    return Product(a, b, scale, magnitude), first.alpha if same else tidy(_alpha(scale, rank, stabilised))


def product_of(delta: Delta) -> Product:
    """A delta's product; the first product of PiSSA and OLoRA is subtracted by as many more components."""
    method, values = delta.method, delta.variables
    assert isinstance(method, LoRA | DoRA)
    a, b = values["a"], values["b"]
    if "start_a" in values:
        a = np.concatenate([a, values["start_a"]], 1)
        b = np.concatenate([b, -values["start_b"]], 0)
    return Product(a, b, method.scale, values.get("magnitude"))


def columns_of(theirs: np.ndarray, part: Part) -> np.ndarray:
    """The part's outputs along the last axis; zero where it has one that is nobody's."""
    return np.where(part.columns >= 0, theirs[..., part.columns], np.zeros((), theirs.dtype))


def norms(base: Base, part: Part) -> np.ndarray:
    """The lengths `[out]` of the columns of the base model's kernel."""
    kernel = node_at(base.params, f"{part.stacked}/kernel")
    kernel = kernel if part.row is None else kernel[part.row]
    return np.asarray(jnp.linalg.norm(kernel.astype(jnp.float32), axis=0))


def tidy(value: float) -> float:
    """Without the last digits, in which a product of roots differs from the number it stands for."""
    return float(f"{value:.12g}")


def _alpha(scale: float, rank: int, stabilised: bool) -> float:
    return scale * (math.sqrt(rank) if stabilised else rank)


def _alike(one: Product, two: Product) -> bool:
    return one.scale == two.scale and one.a.shape == two.a.shape and bool((one.a == two.a).all())


def _checked(
    module: Module, tensors: Mapping[str, np.ndarray], rank: int, weighted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A `[in, r]`, B `[r, out]` and the magnitude; raises `InputError` for what is absent or misshapen."""
    shapes: dict[str, tuple[int, ...]] = {A: (rank, module.inputs), B: (module.outputs, rank)}
    shapes |= {MAGNITUDE: (module.outputs,)} if weighted else {}
    for suffix, shape in shapes.items():
        check_shape(module.name, suffix, tensors, shape)
    if not weighted and MAGNITUDE in tensors:
        raise InputError(f"{module.name} has a {MAGNITUDE}, but the configuration has no use_dora")
    if weighted and not tensors[MAGNITUDE].all():
        raise InputError(
            f"{module.name}: a magnitude of exactly 0 has another meaning here and cannot be read"
        )
    return tensors[A].T, tensors[B].T, tensors.get(MAGNITUDE)


def check_shape(module: str, suffix: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    """Raise `InputError` unless the module has this tensor in this shape."""
    if suffix not in tensors:
        raise InputError(f"{module} has {', '.join(sorted(tensors))} but no {suffix}; the file is damaged")
    if tensors[suffix].shape != shape:
        raise InputError(
            f"{module}.{suffix} has shape {list(tensors[suffix].shape)}; the base model and the "
            f"configuration make it {list(shape)}"
        )


def _delta(product: Product, rank: int, alpha: float, dropout: float, stabilised: bool, start: str) -> Delta:
    variables = {"a": product.a, "b": product.b}
    if product.magnitude is not None:
        dora = DoRA(rank, alpha, dropout, rank_stabilised=stabilised)
        return Delta(dora, {**variables, "magnitude": product.magnitude})
    method = LoRA(rank, alpha, dropout, rank_stabilised=stabilised, initialisation=start)
    return Delta(method, variables)


def _paths(module: Module) -> str:
    return ", ".join(part.path for part in module.parts)
