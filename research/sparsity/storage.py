"""Activation statistics in a file: safetensors, with the layers' names in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ... import InputError
from .statistics import ActivationStatistics, LayerStatistics

FORMAT = "modicum-activations-1"


def save_statistics(path: str | Path, statistics: ActivationStatistics) -> Path:
    """Write the statistics to `path`, whole or not at all."""
    path, tensors = Path(path), {}
    for index, layer in enumerate(statistics.layers):
        tensors[f"{index}/active"] = np.ascontiguousarray(layer.active)
        tensors[f"{index}/total"] = np.ascontiguousarray(layer.total)
        tensors[f"{index}/histogram"] = np.ascontiguousarray(layer.histogram)
        if layer.together is not None:
            tensors[f"{index}/together"] = np.ascontiguousarray(layer.together)
        tensors[f"{index}/counts"] = np.array([layer.tokens, layer.nonzero], np.int64)
    header = {"names": [layer.name for layer in statistics.layers], "threshold": statistics.threshold}
    header["sizes"] = statistics.sizes
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(part, "wb") as file:
        file.write(save(tensors, {"format": FORMAT, "header": json.dumps(header)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def load_statistics(path: str | Path) -> ActivationStatistics:
    """The statistics in a file; raises `InputError` if it is missing, cut off or something else."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: holds {metadata.get('format')!r}, not activation statistics ({FORMAT!r})")
    header = json.loads(metadata["header"])
    layers = []
    for index, name in enumerate(header["names"]):
        tokens, nonzero = (int(count) for count in tensors[f"{index}/counts"])
        arrays = (tensors[f"{index}/{key}"] for key in ("active", "total", "histogram"))
        active, total, histogram = arrays
        together = tensors.get(f"{index}/together")
        layers.append(LayerStatistics(name, tokens, active, nonzero, total, histogram, together))
    return ActivationStatistics(tuple(layers), header["threshold"], header.get("sizes", False))
