"""The tensors of an adapter: `adapter_model.safetensors`, read whole and replaced whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_bytes

from .... import InputError
from ....models.pretrained.container import DTYPES, map_file, read_header, view
from ..storage import write_whole
from .config import CONFIG

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
ROOT, PREFIX = "base_model.", "base_model.model."  # before the names of the base model's modules

Tensors = dict[str, np.ndarray]


def read_tensors(folder: Path) -> Tensors:
    """The tensors by their names in the file; raises `InputError` where it is absent or damaged."""
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise InputError(
                f"{folder / PICKLE} is a pickle, which runs the code in it, so it is not read; in PyTorch: "
                f"safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), {TENSORS!r})"
            )
        raise InputError(f"{path}: no such file, but there is a {CONFIG}")
    stored = read_header(path)
    if odd := sorted(name for name, tensor in stored.items() if tensor.code not in DTYPES):
        raise InputError(f"{path}: {odd[0]} has type {stored[odd[0]].code}, which cannot be read")
    if not stored:
        raise InputError(f"{path}: no tensors in it")
    mapped = map_file(path)
    return {name: np.array(view(mapped, tensor)) for name, tensor in stored.items()}


def write_adapter(folder: Path, config: str, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write the folder, the tensors first; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    write_whole(folder / TENSORS, to_bytes(contiguous, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, config.encode())
    return folder
