"""One safetensors file: a header in JSON, then the tensors' bytes (github.com/huggingface/safetensors).

Tensors are read as views of the mapped file: a byte is read when it is used, and the operating system may
forget it afterwards. They are written one by one, so that only one is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ... import InputError
from .mapping import Index, Shape

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file's name for its type, its first byte and the one after its last."""

    path: Path
    code: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; `make` returns its values when their turn comes."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file; raises `InputError` for a file that is damaged or shorter than it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(LONGEST_HEADER, size - LENGTH_BYTES):
            raise damaged(path, f"its header ends beyond its {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            begin = LENGTH_BYTES + length
            tensors = {name: _stored(path, begin, entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(path, "its header is not that of a safetensors file") from error
    for name, tensor in tensors.items():
        _check(path, name, tensor, begin, size)
    return tensors


def damaged(path: Path, why: str) -> InputError:
    """The error for a file that cannot be read."""
    return InputError(f"{path} is damaged or incomplete: {why}; fetch or copy it again")


def _stored(path: Path, begin: int, entry: Mapping[str, Any]) -> Stored:
    start, stop = (begin + int(offset) for offset in entry["data_offsets"])
    return Stored(path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, stop)


def _check(path: Path, name: str, tensor: Stored, begin: int, size: int) -> None:
    if not begin <= tensor.start <= tensor.stop <= size:
        where = f"bytes {tensor.start} to {tensor.stop}, the data at {begin} to {size}"
        raise damaged(path, f"tensor {name!r} lies at {where}")
    if tensor.code in DTYPES:
        expected = math.prod(tensor.shape) * DTYPES[tensor.code].itemsize
        if min(tensor.shape, default=0) < 0 or tensor.stop - tensor.start != expected:
            found = tensor.stop - tensor.start
            raise damaged(path, f"tensor {name!r} of shape {list(tensor.shape)} has {found} bytes")


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, read when they are used."""
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)  # whose slices cost less


def view(mapped: np.ndarray, tensor: Stored, index: Index | None = None) -> np.ndarray:
    """A tensor, or a part of it, as a view of its mapped file."""
    whole = mapped[tensor.start : tensor.stop].view(DTYPES[tensor.code]).reshape(tensor.shape)
    return whole if index is None else whole[index]


def write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write tensors to a file, each made when its turn comes, and wait until they are on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.bytes]
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # so that the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.make()).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
