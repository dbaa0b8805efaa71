"""Rotary angles: the rotation itself, and the ways to stretch it past the trained length.

A scaling changes the inverse frequencies of the W / 2 pairs and may multiply the rotated vectors. The
names and formulas are those of published configurations (`rope_scaling` in config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi

import jax
import jax.numpy as jnp
import numpy as np

from .. import InputError


def inverse_frequencies(base: float, width: int) -> np.ndarray:
    """`base^(-2i / width)` for i = 0 .. width / 2 - 1 (Su et al., "RoFormer", 2021, section 3.2.2)."""
    return base ** -(np.arange(0, width, 2) / width)


@dataclass(frozen=True)
class RotaryScaling:
    """No scaling; the base of the others. `factor` is how many times the trained length is to be reached."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise InputError(f"{type(self).__name__} has factor={self.factor}; at least 1 is valid")

    @property
    def amplitude(self) -> float:
        """What the rotated queries and keys are multiplied by."""
        return 1.0

    def frequencies(self, base: float, width: int, positions: jax.Array) -> np.ndarray | jax.Array:
        """Inverse frequencies `[width / 2]` for tokens at `positions`."""
        return inverse_frequencies(base, width)


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Positions divided by `factor` (Chen et al., "Extending Context Window", 2023, section 2.3)."""

    def frequencies(self, base: float, width: int, positions: jax.Array) -> np.ndarray:
        """All frequencies divided by the factor."""
        return inverse_frequencies(base, width) / self.factor


@dataclass(frozen=True)
class DynamicScaling(RotaryScaling):
    """A base that grows with the longest sequence of the batch (NTK-aware, r/LocalLLaMA, 2023).

    Keys that a cache already holds keep the rotation of the length at which they were made.
    """

    original_length: int = 2048

    def frequencies(self, base: float, width: int, positions: jax.Array) -> jax.Array:
        """Frequencies of the enlarged base; up to `original_length` tokens it is the trained one."""
        length = jnp.maximum(positions.max() + 1, self.original_length).astype(jnp.float32)
        growth = self.factor * length / self.original_length - (self.factor - 1)
        larger = base * growth ** (width / (width - 2))
        return larger ** -jnp.asarray(np.arange(0, width, 2) / width, jnp.float32)


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Long waves divided by `factor`, short ones kept, a ramp between (LLaMA 3.1's `rope_type: llama3`)."""

    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, base: float, width: int, positions: jax.Array) -> np.ndarray:
        """Waves longer than original_length / low_frequency_factor are long; above the high one, short."""
        plain = inverse_frequencies(base, width)
        turns = self.original_length * plain / (2 * pi)
        ramp = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = np.clip(ramp, 0.0, 1.0)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclass(frozen=True)
class YarnScaling(RotaryScaling):
    """Interpolation by parts and a temperature (Peng et al., "YaRN", 2023, sections 3.2 and 3.4).

    `attention_factor` 0 means the paper's `0.1 ln(factor) + 1`; with both `mscale`s it is the quotient of
    `0.1 mscale ln(factor) + 1` (DeepSeek). `truncate` rounds the ramp's ends to whole pairs.
    """

    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all: float = 0.0
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """The square root of the paper's temperature's inverse."""
        if self.attention_factor:
            return self.attention_factor
        growth = 0.1 * log(self.factor)
        if self.mscale and self.mscale_all:
            return (self.mscale * growth + 1) / (self.mscale_all * growth + 1)
        return growth + 1

    def frequencies(self, base: float, width: int, positions: jax.Array) -> np.ndarray:
        """Pairs that turn over `beta_fast` times are kept, under `beta_slow` times interpolated."""
        plain = inverse_frequencies(base, width)
        low, high = self._pair(self.beta_fast, base, width), self._pair(self.beta_slow, base, width)
        if self.truncate:
            low, high = float(np.floor(low)), float(np.ceil(high))
        low, high = max(low, 0.0), min(high, width - 1.0)
        high = high + 0.001 if low == high else high
        interpolated = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
        return interpolated * plain / self.factor + (1 - interpolated) * plain

    def _pair(self, turns: float, base: float, width: int) -> float:
        """The (fractional) pair that turns this often within the original length."""
        return width * log(self.original_length / (turns * 2 * pi)) / (2 * log(base))


def rotate_pairs(x: jax.Array, angles: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate each pair of `x [..., W]` by `angles [..., W/2]`; pairs are the two halves or neighbours."""
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    rotated = first * cosine - second * sine, second * cosine + first * sine
    return jnp.stack(rotated, -1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, -1)
