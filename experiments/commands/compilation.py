"""Compiled programs are kept between runs: the same program is compiled once on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_compilations(smoke: bool = False) -> None:
    """Let JAX keep compiled programs in the user's cache folder, unless a folder was chosen already.

    A `smoke` form compiles without most optimizations: that takes longer than what it computes.
    """
    import jax

    if smoke:
        jax.config.update("jax_disable_most_optimizations", True)
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "modicum" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
