"""Acts around calls of NNX modules: a subclass that asks the instance what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ... import InputError

ACT = "_delta_act"  # where a module's copy keeps what it does at a call
HOOKED = "_delta_hooked"  # where its class says which methods ask

Keys = tuple[Any, ...]
Act = Callable[[Any, str, Callable[..., Any], tuple, dict], Any]


def hook(module: Any, act: Act, at: Iterable[str]) -> None:
    """Let `act` stand around those methods `at` that the module has."""
    found = tuple(sorted(name for name in at if callable(getattr(type(module), name, None))))
    if found:
        setattr(module, ACT, act)
        cls: Any = type(module)
        # One that is hooked already asks its act: two would ask it twice.
        if not set(found) <= set(getattr(cls, HOOKED, ())):
            module.__class__ = _hooked(cls, found)


@functools.cache  # one class for one class: graph definitions compare classes
def _hooked(cls: type, at: tuple[str, ...]) -> type:
    """A subclass whose methods `at` ask the instance's act; a parent's method inside one does not."""

    def around(name: str) -> Callable[..., Any]:
        plain = getattr(cls, name)

        @functools.wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, ACT)(self, name, functools.partial(plain, self), args, kwargs)

        return method

    body = {"__module__": cls.__module__, HOOKED: at, **{name: around(name) for name in at}}
    return type(cls)(cls.__name__, (cls,), body)


@dataclass(eq=False)
class _Changing:
    """What a module does while its first output is changed: what it did before, and the change."""

    change: Callable[[Any], Any]
    before: Act | None
    done: bool = False

    def __call__(self, module: Any, at: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        output = call(*args, **kwargs) if self.before is None else self.before(module, at, call, args, kwargs)
        if at != "__call__" or self.done:
            return output
        self.done = True
        return self.change(output)


@contextmanager
def changed_output(module: Any, path: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """As `sites.changed_output`, for a running NNX module."""
    found = [each for keys, each in modules(module) if joined(keys) == path]
    if not found:
        raise InputError(f"{path}: the NNX model has no module of that name")
    cls, before = type(found[0]), getattr(found[0], ACT, None)
    hook(found[0], _Changing(change, before), {"__call__"})
    try:
        yield
    finally:
        found[0].__class__ = cls
        delattr(found[0], ACT)
        if before is not None:
            setattr(found[0], ACT, before)


def modules(module: Any) -> Iterator[tuple[Keys, Any]]:
    """All modules in `module`, itself included, each once, with its path."""
    from flax import nnx

    yield from nnx.iter_modules(module)


def joined(keys: Keys) -> str:
    """An NNX path as a delta's."""
    return "/".join(map(str, keys))
