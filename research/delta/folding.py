"""Repeated layers shown once: `layers_{0-11}/attention/query` for twelve paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NUMBERED = re.compile(r"(^|(?<=/)|(?<=_))\d+(?=/|$)")


def fold(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths that differ only in their first layer number, under one address that names them all."""
    groups: dict[str, dict[str, int | None]] = {}
    for path in paths:
        match = NUMBERED.search(path)
        key = path if match is None else NUMBERED.sub("{}", path, count=1)
        groups.setdefault(key, {})[path] = int(match[0]) if match else None
    folded = {}
    for key, members in groups.items():
        numbers = sorted(number for number in members.values() if number is not None)
        name = next(iter(members)) if len(members) == 1 else key.replace("{}", "{" + spans(numbers) + "}")
        folded[name] = list(members)
    return folded


def spans(numbers: Iterable[int]) -> str:
    """Sorted numbers as intervals: 0, 1, 2, 5 is `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def near_misses(address: str, paths: Iterable[str], count: int = 3) -> str:
    """The folded paths most like `address`, as the end of an error message."""
    folded = [path for path in fold(paths) if path]
    wanted = address.removeprefix("re:")
    wanted = wanted if "/" in wanted else wanted.replace(".", "/")  # PyTorch's separator
    depth = wanted.count("/") + 1
    ends = list(dict.fromkeys("/".join(path.split("/")[-depth:]) for path in folded))
    # Numbers say little about a name: compare without them, show with them.
    bare = {re.sub(r"[\d{},-]+", "", end): end for end in reversed(ends)}
    close = difflib.get_close_matches(re.sub(r"[\d{},-]+", "", wanted), bare, n=count, cutoff=0.5)
    if close:
        return "; near misses: " + ", ".join(bare[name] for name in close)
    return "; there are " + ", ".join(folded[:count]) + (", ..." if len(folded) > count else "")
