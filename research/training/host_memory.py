"""Memory that a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import platform

# From malloc.h: a parameter's number and its new value.
SETTINGS = (
    (-4, 0),  # M_MMAP_MAX: no block is a mapping of its own, which would be given back when freed
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: the end of the heap is not given back either
    (-8, 1),  # M_ARENA_MAX: one heap for all threads; those of further heaps could not grow so large
)


def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees; returns whether it does (glibc).

    XLA:CPU asks for a step's temporaries anew each time. Given back in between, every page is cleared by the
    kernel again: for MiniLM, batch 16 of 128 tokens, 84,000 page faults and 0.2 of 1.5 seconds of a step. The
    process then stays as large as it ever was. To be called before JAX starts its threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return sum(library.mallopt(number, value) for number, value in SETTINGS) == len(SETTINGS)
