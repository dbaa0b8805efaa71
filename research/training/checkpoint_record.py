"""The record kept beside a checkpoint's arrays: what they are, their fingerprints, and the caller's metadata.

It is one JSON file in each step's folder and carries a digest of itself, so that a damaged record
is told from the record of another model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .fingerprint import fingerprint, leaf_paths

__all__ = ["Record", "Unreadable", "describe", "differences", "is_array"]

FORMAT = 1


class Unreadable(Exception):
    """A checkpoint is damaged; the message says what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """What one checkpoint holds.

    Attributes:
        leaves: path -> `float32[8,16]` for arrays, `int`, `float`, `bool` or `str` for Python values.
        values: path -> the Python values, which live here and not in the arrays' files.
        fingerprints: path -> fingerprint of each array.
        metadata: the caller's, anything JSON can hold.
        metrics: name -> number, what the best checkpoint is chosen by.
    """

    leaves: Mapping[str, str]
    values: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, state: Any, metadata: Mapping[str, Any], metrics: Mapping[str, float]) -> "Record":
        """The record of `state`, whose arrays are read once on the device for their fingerprints."""
        leaves = leaf_paths(state)
        arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
        return cls(
            leaves=describe(state),
            values={path: leaf for path, leaf in leaves.items() if path not in arrays},
            fingerprints=fingerprint(arrays),
            metadata=metadata,
            metrics={name: float(value) for name, value in metrics.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the digest of the rest under `digest`."""
        body = json.loads(json.dumps({"format": FORMAT, **self.__dict__}))
        return {**body, "digest": _digest(body)}

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in the file `path`; raises `Unreadable` where it is missing or damaged."""
        try:
            body = json.loads(path.read_text("utf-8"))
            digest = body.pop("digest")
        except FileNotFoundError:
            raise Unreadable("its record is missing") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise Unreadable(f"its record cannot be read ({type(error).__name__})") from error
        if digest != _digest(body):
            raise Unreadable("its record does not match the digest it carries")
        if body.pop("format") != FORMAT:
            raise Unreadable(f"its record is not of format {FORMAT}")
        return cls(**body)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is stored as an array (jax, numpy or abstract) and not as a Python value."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def describe(tree: Any) -> dict[str, str]:
    """Path -> element type and shape (`bfloat16[8,16]`), or the type's name for a Python value.

    Raises:
        TypeError: for a leaf that is neither an array nor int, float, bool or str.
    """
    return {path: _kind(path, leaf) for path, leaf in leaf_paths(tree).items()}


def differences(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """How the leaves of a checkpoint differ from those asked for, one phrase a leaf, in path order."""
    found = []
    for path in sorted({*stored, *wanted}):
        if path not in stored:
            found.append(f"{path} {wanted[path]} is not in it")
        elif path not in wanted:
            found.append(f"{path} {stored[path]} is only in it")
        elif stored[path] != wanted[path]:
            found.append(f"{path} is {stored[path]} in it, {wanted[path]} here")
    return found


def _kind(path: str, leaf: Any) -> str:
    if is_array(leaf):
        return f"{_dtype_name(leaf.dtype)}[{','.join(str(size) for size in leaf.shape)}]"
    if isinstance(leaf, bool | int | float | str):
        return type(leaf).__name__
    raise TypeError(f"{path} is a {type(leaf).__name__}; a checkpoint holds arrays, numbers, bool and str")


def _dtype_name(dtype: Any) -> str:
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return str(dtype) if is_key else np.dtype(dtype).name


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
