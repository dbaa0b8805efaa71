"""Rotary positions in config.json: `rope_parameters`, or (older) `rope_theta` and `rope_scaling`.

The names of the types and what each reads are those of `transformers.modeling_rope_utils`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ... import InputError
from .. import Rotary
from ..rotary import DynamicScaling, LinearScaling, Llama3Scaling, RotaryScaling, YarnScaling
from .settings import Settings

THETA = 10_000.0


def read_rope(settings: Settings, length: int) -> Rotary:
    """Rotary positions of a model with `max_position_embeddings=length`; what cannot be had is refused."""
    new, old = settings.take("rope_parameters", None), settings.take("rope_scaling", None)
    theta, share = settings.take("rope_theta", THETA), settings.take("partial_rotary_factor", 1.0)
    given = {"rope_theta": theta, "partial_rotary_factor": share} | dict(old or new or {})
    rope = Settings(given, ignore=("original_max_position_embeddings", "type"))
    kind = rope.take("rope_type", given.get("type") or "default")
    rope.require("partial_rotary_factor", 1.0, None)
    if kind not in SCALINGS:
        settings.refuse(f"rope_type={kind!r} (valid: {', '.join(SCALINGS)})")
        return Rotary()
    scaling = SCALINGS[kind](rope, length)
    base = float(rope.take("rope_theta") or THETA)
    try:
        rope.finish(f"{kind} rotary")
    except InputError as error:
        settings.refuse(f"rope_parameters: {error}")
    return Rotary(base=base, scaling=scaling)


def _plain(rope: Settings, length: int) -> RotaryScaling:
    return RotaryScaling()


def _linear(rope: Settings, length: int) -> RotaryScaling:
    return LinearScaling(float(rope.take("factor")))


def _dynamic(rope: Settings, length: int) -> RotaryScaling:
    return DynamicScaling(float(rope.take("factor")), length)


def _original(rope: Settings, length: int) -> int:
    return rope.take("original_max_position_embeddings", None) or length


def _llama3(rope: Settings, length: int) -> RotaryScaling:
    return Llama3Scaling(
        float(rope.take("factor")),
        low_frequency_factor=float(rope.take("low_freq_factor")),
        high_frequency_factor=float(rope.take("high_freq_factor")),
        original_length=_original(rope, length),
    )


def _yarn(rope: Settings, length: int) -> RotaryScaling:
    original = _original(rope, length)
    return YarnScaling(
        float(rope.take("factor", None) or length / original),
        original_length=original,
        beta_fast=float(rope.take("beta_fast", None) or 32),
        beta_slow=float(rope.take("beta_slow", None) or 1),
        attention_factor=float(rope.take("attention_factor", None) or 0),
        mscale=float(rope.take("mscale", None) or 0),
        mscale_all=float(rope.take("mscale_all_dim", None) or 0),
        truncate=rope.take("truncate", True),
    )


SCALINGS: Mapping[str, Callable[[Settings, int], RotaryScaling]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


def write_rope(rotary: Rotary) -> dict[str, Any]:
    """The keys of config.json, those of transformers 5 and those of older ones."""
    scaling = _their_scaling(rotary.scaling)
    keys: dict[str, Any] = {
        "rope_parameters": {**scaling, "rope_theta": rotary.base},
        "rope_theta": rotary.base,
        "rope_scaling": scaling if len(scaling) > 1 else None,
    }
    if isinstance(rotary.scaling, DynamicScaling):
        keys["max_position_embeddings"] = rotary.scaling.original_length
    return keys


def _their_scaling(scaling: RotaryScaling) -> dict[str, Any]:
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling():
            values = {
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all,
            }
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                **{key: value for key, value in values.items() if value},
            }
    return {"rope_type": "default"}
