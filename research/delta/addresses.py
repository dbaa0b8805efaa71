"""The address language: which modules or leaves of a model a delta acts on.

Paths are `/`-joined names, `layers_3/attention/query`. An address is one of

* plain, `attention/query`: the end of a path, starting at a component. `(query|value)` are alternatives,
  `layers_{0-11}`, `layers_{0,3}` and `layers_{6-}` are layers by number. The empty address is the root.
* `re:` and a regular expression, `re:.*(query|value)`: must match from the start of a component to the
  end of the path; braces keep their meaning in regular expressions.

In a model with scanned layers the number is not in the path: there `layers_{0-3}/attention/query` names
the first four rows of the leading axis of `layers/attention/query`. Where such a model repeats a pattern
of layers (`layers/layer_0`, `layers/layer_1`, rows over repetitions), numbers count layers, not rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from ... import InputError
from .folding import near_misses
from .trees import node_at

RANGE = re.compile(r"\{([^{}]*)\}")
PART = re.compile(r"(\d+)(?:(-)(\d*))?")


@dataclass(frozen=True)
class Hit:
    """That an address names a path: all of it, or `rows` of its leading axis of `total` layers."""

    rows: tuple[int, ...] | None = None
    total: int = 0


@dataclass(frozen=True)
class Numbers:
    """Layer numbers as written between braces: closed intervals, the last possibly open (`None`)."""

    intervals: tuple[tuple[int, int | None], ...]

    def __contains__(self, number: int) -> bool:
        return any(low <= number and (high is None or number <= high) for low, high in self.intervals)

    @property
    def last(self) -> int:
        """The largest number that is written out."""
        return max(low if high is None else high for low, high in self.intervals)


@dataclass(frozen=True)
class Address:
    """A parsed address; raises `InputError` where the text is malformed."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"delta address {self.text!r} is no text; write 'attention/query' for example")
        if not self.text.startswith("re:") and (self.text.startswith("/") or self.text.endswith("/")):
            raise InputError(
                f"delta address {self.text!r} begins or ends with '/'; write {self.text.strip('/')!r}"
            )
        _ = self.numbers, self._literal, self._stacked

    @cached_property
    def numbers(self) -> Numbers | None:
        """The layer range, if the address has one."""
        if self.text.startswith("re:"):
            return None
        found = RANGE.findall(self.text)
        if len(found) > 1:
            raise InputError(f"delta address {self.text!r} has {len(found)} layer ranges; one is allowed")
        return _numbers(found[0], self.text) if found else None

    @cached_property
    def _literal(self) -> re.Pattern[str]:
        """Matches paths that carry the number, in the group `number`."""
        body = self.text[3:] if self.text.startswith("re:") else None
        if body is None:
            before, _, after = _split(self.text)
            body = _escape(before) + (r"(?P<number>\d+)" if self.numbers else "") + _escape(after)
        return _compile(rf"(?:.*/)?(?:{body})", self.text)

    @cached_property
    def _stacked(self) -> re.Pattern[str] | None:
        """Matches paths of stacked layers: `stack` is where the stack is, `slot` the layer of a pattern."""
        before, found, after = _split(self.text)
        stem = before.rstrip("_/")
        if self.text.startswith("re:") or not found or not stem or (after and not after.startswith("/")):
            return None
        if before.count("(") != before.count(")"):
            raise InputError(
                f"delta address {self.text!r} has a layer range inside parentheses; put it outside"
            )
        pattern = rf"(?P<stack>(?:.*/)?{_escape(stem)})(?:/layer_(?P<slot>\d+))?{_escape(after)}"
        return _compile(pattern, self.text)

    def hit(self, path: str, params: Mapping[str, Any]) -> Hit | None:
        """Whether, and in which rows, the address names `path` of a model with these parameters."""
        if match := self._literal.fullmatch(path):
            return Hit() if self.numbers is None or int(match["number"]) in self.numbers else None
        match = self._stacked and self._stacked.fullmatch(path)
        if not match or self.numbers is None:
            return None
        rows, period = stack(params, match["stack"])
        slot = int(match["slot"] or 0)
        kept = tuple(row for row in range(rows) if row * period + slot in self.numbers)
        return None if not kept else Hit() if len(kept) == rows else Hit(kept, rows)

    def hit_above(self, path: str, params: Mapping[str, Any]) -> Hit | None:
        """As `hit`, for `path` or the nearest path above it that the address names."""
        return next((found for each in reversed(above_path(path)) if (found := self.hit(each, params))), None)

    def layers(self, paths: Iterable[str], params: Mapping[str, Any]) -> int:
        """How many layers the model has where the address has its range; 0 where there are none."""
        before = _escape(_split(self.text)[0])
        numbered = re.compile(rf"(?:.*/)?{before}(\d+)(?:/.*)?")
        count = 0
        for path in paths:
            if match := numbered.fullmatch(path):
                count = max(count, int(match[match.lastindex or 0]) + 1)
            elif self._stacked and (match := self._stacked.fullmatch(path)):
                rows, period = stack(params, match["stack"])
                count = max(count, rows * period)
        return count


def select(
    address: Address,
    paths: Sequence[str],
    params: Mapping[str, Any],
    *,
    exclude: Sequence[Address] = (),
    above: bool = False,
    what: str = "module",
) -> dict[str, Hit]:
    """The paths that `address` names and no address in `exclude` does, at the path or above it.

    With `above`, naming a path names everything below it. Raises `InputError`, with near misses, if the
    address names none, and if it numbers a layer that is not there.
    """
    named = {path: hit for path in paths if (hit := resolve(address, path, params, above=above))}
    everywhere = dict.fromkeys(each for path in paths for each in (above_path(path) if above else [path]))
    if not named:
        raise InputError(
            f"delta address {address.text!r} names no {what}{near_misses(address.text, everywhere)}"
        )
    layers = address.layers(everywhere, params) if address.numbers else 0
    if address.numbers and layers and address.numbers.last >= layers:
        last = address.numbers.last
        raise InputError(
            f"delta address {address.text!r} names layer {last}; the model has layers 0-{layers - 1}"
        )
    kept = {path: resolve(address, path, params, exclude=exclude, above=above) for path in named}
    if not any(kept.values()):
        raise InputError(
            f"delta address {address.text!r}: exclude={[e.text for e in exclude]} leaves nothing of it"
        )
    return {path: hit for path, hit in kept.items() if hit}


def resolve(
    address: Address,
    path: str,
    params: Mapping[str, Any],
    *,
    exclude: Sequence[Address] = (),
    above: bool = False,
) -> Hit | None:
    """What `address` names of `path` after `exclude`; None for nothing."""
    hit = address.hit_above(path, params) if above else address.hit(path, params)
    for each in exclude:
        if hit and (out := each.hit_above(path, params)):
            hit = _without(hit, out)
    return hit


def above_path(path: str) -> list[str]:
    """The paths from the root to `path`, both included."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:length]) for length in range(len(parts) + 1)]


def stack(params: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Rows of the stacked layers at `path`, and layers per row; (0, 1) where nothing is stacked there."""
    node = node_at(params, path)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(node)}
    if not isinstance(node, Mapping) or len(sizes) != 1:
        return 0, 1
    slots = [name for name in node if re.fullmatch(r"layer_\d+", name)]
    return sizes.pop(), max(1, len(slots))


def _without(hit: Hit, out: Hit) -> Hit | None:
    if out.rows is None:
        return None
    rows = range(out.total) if hit.rows is None else hit.rows
    kept = tuple(row for row in rows if row not in out.rows)
    return Hit(kept, out.total) if kept else None


def _split(text: str) -> tuple[str, str, str]:
    """The text before the range, the range, and after it."""
    match = None if text.startswith("re:") else RANGE.search(text)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def _escape(text: str) -> str:
    """Plain text as a regular expression in which only `(`, `|` and `)` are special."""
    return re.sub(r"\\([(|)])", r"\1", re.escape(text)).replace("(", "(?:")


def _compile(pattern: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"delta address {text!r} is not valid: {error}") from None


def _numbers(inside: str, text: str) -> Numbers:
    intervals = []
    for part in inside.split(","):
        match = PART.fullmatch(part.strip())
        low, dash, high = match.groups() if match else ("", None, None)
        end = int(high) if high else None if dash else int(low or 0)
        if not match or (end is not None and end < int(low)):
            raise InputError(
                f"delta address {text!r}: {{{inside}}} is no layer range; write {{0-11}}, {{0,3}} or {{6-}}"
            )
        intervals.append((int(low), end))
    return Numbers(tuple(intervals))
