"""`attach`: a model and a specification become a tuned model, whose only trained numbers are the delta's.

tuned = attach(model, {"layers_{0-11}/attention/(query|value)": LoRA(rank=8), "classifier": Full()})
variables = tuned.init(rng, params, tokens)            # {"delta": trained, "delta_state": not trained}
logits = tuned.apply(variables, params, tokens)        # differentiable in the first argument
merged = tuned.merge(params, variables)                # where every method allows it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from ... import InputError
from ...models.model import LinenModel, Model, as_linen, as_model
from .addresses import Address, Hit, resolve, select
from .folding import near_misses
from .leaves import FunctionModel, apply_leaf, init_leaf, leaf_key, on_rows
from .methods import LeafMethod, Method, SiteMethod, Variables
from .sites import apply_sites, find_calls, init_site, spread
from .trees import (
    SHARED,
    Place,
    Tree,
    from_places,
    leaf_paths,
    node_at,
    own_params,
    variables_by_place,
    with_node,
)

if TYPE_CHECKING:
    from .tree import ModelTree

Spec = Mapping[str, Method | Sequence[Method]]


@dataclass(frozen=True)
class Entry:
    """One method at one address; its variables lie under `name`, which no other entry has."""

    name: str
    address: Address
    method: Method


@dataclass(frozen=True)
class Tuned:
    """A model with deltas attached, as pure functions of the delta, the backbone and the inputs."""

    model: Model
    entries: tuple[Entry, ...]
    exclude: tuple[Address, ...] = ()

    def init(self, rng: jax.Array, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tree]:
        """`{"delta": ..., "delta_state": ...}` for a model called as `apply(params, *args, **kwargs)`.

        The model is traced for shapes only; with leaf methods alone it needs no `args`. Raises `InputError`
        for an address that names nothing and for a method that does not fit its site.
        """
        _require_bare(params)
        trained: dict[Place, Variables] = {}
        state: dict[Place, Variables] = {}
        leaves = leaf_paths(params)
        calls = {}
        if self._sites:
            at = {method.at for method in self._sites.values()}
            calls = find_calls(self.model, params, args, kwargs, at)
        modules = sorted({path for by_path in calls.values() for path in by_path})
        self._check_exclude([*modules, *leaves], params)
        for entry in self.entries:
            if isinstance(method := entry.method, SiteMethod):
                found = calls[method.at]
                for path, hit in self._select(entry, list(found), params).items():
                    place = path, entry.name
                    trained[place], state[place] = init_site(
                        method, entry.name, rng, path, found[path], hit, params
                    )
            else:
                for path, hit in self._select(entry, leaves, params).items():
                    leaf = node_at(params, path)
                    place = path, entry.name
                    trained[place], state[place] = init_leaf(method, rng, path, leaf, hit)
                if common := method.shared(leaf_key(rng, entry.name)):
                    trained["", entry.name] = {SHARED: common}
        variables = {"delta": from_places(trained), "delta_state": from_places(state)}
        _require_order(self.hits(variables, params))
        return variables

    def apply(
        self,
        variables: Mapping[str, Any],
        params: Mapping[str, Any],
        *args: Any,
        rng: jax.Array | None = None,
        train: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model's outputs with the delta in place; `rng` feeds dropout where `train`.

        Deltas are ordinary arguments: another task's variables of the same shapes recompile nothing.
        Raises `InputError` if a delta's module or array is not there.
        """
        _require_bare(params)
        self.require_key(rng, train)
        params = self._with_leaves(variables, params, rng if train else None)
        kwargs = {**kwargs, "rng": rng, "train": train}
        expected = {place: entry for place, entry in self._places(variables) if entry.name in self._sites}
        if not expected:
            return self.model.apply(params, *args, **kwargs)
        own = variables_by_place(variables)
        for (path, name), entry in expected.items():
            placed = spread(own[path, name], self._hit(entry, path, params), self._sites[name].neutral)
            params = with_node(params, f"{path}/{name}".strip("/"), placed)
        # With a filled cache a model need not call what made the keys and values that the cache holds.
        cached = getattr(kwargs.get("cache"), "entries", None)
        return apply_sites(self.model, params, self._sites, () if cached else expected, args, kwargs)

    def require_key(self, rng: jax.Array | None, train: bool) -> None:
        """Raise `InputError` where a method is to draw at random and has no key."""
        drawing = [type(entry.method).__name__ for entry in self.entries if entry.method.random]
        if train and rng is None and drawing:
            raise InputError(f"{drawing[0]} draws at random: apply(..., train=True) needs rng=")

    def bind(self, variables: Mapping[str, Any]) -> BoundModel:
        """The tuned Linen model as a plain one, for code that takes a model and its parameters.

        Inside a compiled function, bind there: arrays bound outside become constants of the program.
        """
        return BoundModel(as_linen(self.model).module, self, variables)

    def merge(self, params: Mapping[str, Any], variables: Mapping[str, Any]) -> Tree:
        """Parameters of the plain model that compute what the tuned one does (without dropout).

        Raises `InputError` that names the method which no weights can express, and where it is, and for a
        model whose products are scaled: the methods' products are not, which is not accounted for yet.
        """
        if getattr(getattr(self.model, "config", None), "scaled_linears", False) and self._sites:
            raise InputError(
                "merge: this model divides its products by sqrt(width) (scaled_linears=True) and a delta's "
                "not; keep the delta attached"
            )
        merged, own = self._with_leaves(variables, params), variables_by_place(variables)
        for (path, name), entry in self._places(variables):
            if isinstance(method := entry.method, SiteMethod):
                placed = spread(own[path, name], self._hit(entry, path, params), method.neutral)
                merged = _with_site(merged, path, partial(method.merge, placed))
        return merged

    def unmerge(self, merged: Mapping[str, Any], variables: Mapping[str, Any]) -> Tree:
        """The backbone again, from what `merge` returned, up to rounding.

        Raises `InputError` that names a method whose merge cannot be undone (`Full` keeps nothing of it).
        """
        params, own = dict(merged), variables_by_place(variables)
        # The reverse of `merge`, which does arrays first: sorted is stable.
        in_order = sorted(self._places(variables), key=lambda each: isinstance(each[1].method, SiteMethod))
        for (path, name), entry in reversed(in_order):
            hit, method = self._hit(entry, path, params), entry.method
            if isinstance(method, SiteMethod):
                placed = spread(own[path, name], hit, method.neutral)
                params = _with_site(params, path, partial(method.unmerge, placed))
            else:
                undo = partial(method.unmerge, own[path, name], path=path)
                params = on_rows(params, path, hit, undo)
        return params

    def penalty(self, variables: Mapping[str, Any]) -> Any:
        """What the methods add to the mean loss in training (orthogonality, expected density)."""
        own = variables_by_place(variables)
        return sum(entry.method.penalty(own[place]) for place, entry in self._places(variables))

    @property
    def penalised(self) -> bool:
        """Whether any method has a penalty."""
        plain = SiteMethod.penalty, LeafMethod.penalty
        return any(type(entry.method).penalty not in plain for entry in self.entries)

    def hits(self, variables: Mapping[str, Any], params: Mapping[str, Any]) -> dict[tuple[str, Entry], Hit]:
        """Where a delta's variables act, and in which layers of a stack."""
        return {(path, entry): self._hit(entry, path, params) for (path, _), entry in self._places(variables)}

    def tree(self, params: Mapping[str, Any], variables: Mapping[str, Any]) -> ModelTree:
        """What is frozen, tuned and added, as a tree with repeated layers folded; `print` shows it."""
        from .tree import tree

        return tree(self, params, variables)

    @cached_property
    def _sites(self) -> dict[str, SiteMethod]:
        return {entry.name: entry.method for entry in self.entries if isinstance(entry.method, SiteMethod)}

    def _places(self, variables: Mapping[str, Any]) -> Iterator[tuple[Place, Entry]]:
        """The places in a delta tree with their entries, in the order of the entries."""
        found = variables_by_place(variables)
        names = {entry.name for entry in self.entries}
        if unknown := sorted({name for _, name in found} - names):
            raise InputError(
                f"the delta has {unknown[0]!r}; this specification has {', '.join(sorted(names))}"
            )
        for entry in self.entries:
            yield from ((place, entry) for place in found if place[1] == entry.name)

    def _with_leaves(
        self, variables: Mapping[str, Any], params: Mapping[str, Any], rng: jax.Array | None = None
    ) -> Tree:
        own, changed = variables_by_place(variables), dict(params)
        for (path, name), entry in self._places(variables):
            if isinstance(entry.method, LeafMethod):
                hit = self._hit(entry, path, params)
                changed = apply_leaf(entry.method, own[path, name], changed, path, hit, rng)
        return changed

    def _hit(self, entry: Entry, path: str, params: Mapping[str, Any]) -> Hit:
        above = isinstance(entry.method, LeafMethod)
        hit = resolve(entry.address, path, params, exclude=self.exclude, above=above)
        if hit is None:
            raise InputError(
                f"{path}: the delta has variables here, but {entry.address.text!r} does not name it"
            )
        return hit

    def _select(self, entry: Entry, paths: Sequence[str], params: Mapping[str, Any]) -> dict[str, Hit]:
        method, address = entry.method, entry.address
        if isinstance(method, SiteMethod):
            if not paths:
                raise InputError(
                    f"{type(method).__name__} acts at {method.at!r}, and no module that this model "
                    f"called has it"
                )
            return select(address, paths, params, exclude=self.exclude)
        named = select(address, paths, params, exclude=self.exclude, above=True, what="array")
        found = {path: hit for path, hit in named.items() if method.accepts(path)}
        if not found:
            raise InputError(
                f"{type(method).__name__} at {address.text!r}: none of the {len(named)} arrays there fits, "
                f"such as {next(iter(named))}"
            )
        return found

    def _check_exclude(self, paths: Sequence[str], params: Mapping[str, Any]) -> None:
        for address in self.exclude:
            if not any(address.hit_above(path, params) for path in paths):
                raise InputError(
                    f"exclude address {address.text!r} names nothing{near_misses(address.text, paths)}"
                )


@dataclass(frozen=True, eq=False)
class BoundModel(LinenModel):
    """A tuned model with its variables: `apply(params, ...)`, and hooks read and edit it like any other."""

    tuned: Tuned
    variables: Mapping[str, Any]

    def apply(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Outputs of the tuned model on the backbone `params`."""
        return self.tuned.apply(self.variables, params, *args, **kwargs)


def attach(model: Model | nn.Module, spec: Spec | Method, *, exclude: Iterable[str] = ()) -> Tuned:
    """`model` with the methods of `spec` (address -> method, or several in order) to be attached to it.

    A method alone goes to its default positions. Methods at one place act in the order of the specification.
    `exclude` holds addresses to leave out, with everything below them. Site methods need a Linen model,
    leaf methods any. Raises `InputError` for a malformed specification.
    """
    return Tuned(as_model(model), _entries(spec), _excluded(exclude))


def attach_leaves(function: Callable[..., Any], spec: Spec | Method, *, exclude: Iterable[str] = ()) -> Tuned:
    """Leaf methods attached to any function `f(params, *args, **kwargs)` of a nested dictionary of arrays."""
    entries = _entries(spec)
    for entry in entries:
        if not isinstance(entry.method, LeafMethod):
            name = type(entry.method).__name__
            raise InputError(
                f"{name} acts at modules, and a function has none; use attach() on a Linen model"
            )
    return Tuned(FunctionModel(function), entries, _excluded(exclude))


def _require_order(hits: Mapping[tuple[str, Entry], Hit]) -> None:
    """Raise `InputError` where a method that must be innermost comes after another one."""
    before: dict[str, list[tuple[Entry, Hit]]] = {}
    for (path, entry), hit in hits.items():
        if not isinstance(method := entry.method, SiteMethod):
            continue
        for other, taken in before.setdefault(path, []):
            shared = hit.rows is None or taken.rows is None or set(hit.rows) & set(taken.rows)
            if method.innermost and shared:
                name, first = type(method).__name__, type(other.method).__name__
                raise InputError(
                    f"{path}: {name} must come before {first} here, it takes the module to compute what its "
                    f"kernel says; list {name} first in the specification"
                )
        before[path].append((entry, hit))


def _entries(spec: Spec | Method) -> tuple[Entry, ...]:
    if isinstance(spec, Method):
        spec = dict.fromkeys(spec.positions, spec)
    if not isinstance(spec, Mapping) or not spec:
        found = "empty" if isinstance(spec, Mapping) else f"a {type(spec).__name__}"
        raise InputError(
            f"a delta specification maps addresses to methods, {{'attention/query': LoRA()}}; this is {found}"
        )
    counts: Counter[str] = Counter()
    entries = []
    for text, methods in spec.items():
        for method in methods if isinstance(methods, list | tuple) else [methods]:
            if not isinstance(method, Method):
                raise InputError(f"delta at {text!r}: {method!r} is no delta method such as LoRA(rank=8)")
            number = counts[method.name]
            counts[method.name] += 1
            entries.append(
                Entry(f"~{method.name}_{number}" if number else f"~{method.name}", Address(text), method)
            )
    return tuple(entries)


def _excluded(exclude: Iterable[str]) -> tuple[Address, ...]:
    return tuple(Address(text) for text in ([exclude] if isinstance(exclude, str) else exclude))


def _with_site(params: Mapping[str, Any], path: str, change: Callable[..., Variables]) -> Tree:
    """`params` with the own parameters of the module at `path` changed."""
    new = change(own_params(node_at(params, path)), path)
    return {**params, **new} if path == "" else with_node(params, path, new)


def _require_bare(params: Mapping[str, Any]) -> None:
    if isinstance(params, Mapping) and set(params) == {"params"}:
        raise InputError("params is wrapped as {'params': ...}; pass the tree inside")
