"""Lengths rounded up to a few sizes, so that programs are compiled per size and not per length."""

from __future__ import annotations

from ... import InputError

PROMPT = NEW = 16
"""The smallest buckets of a prompt and of new tokens: below, padding costs less than one more program."""


def bucket(length: int, smallest: int = 1) -> int:
    """The smallest of `smallest * 2^k` and `smallest * 3 * 2^(k-1)` that holds `length` columns.

    Two sizes for each doubling: up to length n there are about 2 log2(n / smallest) programs, and at most
    a third of a bucket is padding.

    Raises InputError where either number is below 1.
    """
    for name, value in (("length", length), ("smallest", smallest)):
        if value < 1:
            raise InputError(f"a bucket has {name}={value}; at least 1 is valid")
    size = smallest
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size
