"""Delta files: a folder with the tensors in safetensors and everything else in `delta.json`.

A folder holds nothing of the backbone but its hash, which is checked at loading: a delta on other weights
computes nonsense without complaint. `delta.json` names its tensor file by content and is replaced last, so
a write that is cut off leaves the delta that was there before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as to_bytes

from ... import InputError
from ...models.model import Model, as_model
from .addresses import Address
from .attach import Entry, Tuned
from .methods import LeafMethod, Method
from .registry import METHODS
from .trees import leaf_paths, node_at

FORMAT, VERSION = "modicum-delta", 1
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U64": "uint64",
    "I64": "int64",
    "U32": "uint32",
    "I32": "int32",
    "U16": "uint16",
    "I16": "int16",
    "U8": "uint8",
    "I8": "int8",
    "BOOL": "bool",
}
# What `delta.json` has, and what its entries and its `tensors` have.
HEADER = {"backbone": str, "entries": list, "exclude": list, "notes": dict, "tensors": dict}
ENTRY = {"name": str, "address": str, "method": str, "fields": dict}
TENSORS = {"file": str, "sha256": str, "bytes": int, "same": dict}


def save_delta(
    folder: str | Path,
    tuned: Tuned,
    variables: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    *,
    backbone: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a delta to `folder` and return it; a delta that is there is replaced, or stays whole.

    `backbone` is the hash of the weights it belongs to, computed from `params` where not given. `notes` is
    JSON of your own, returned by `read_header`. With several processes, call it on one.
    """
    if backbone is None:
        if params is None:
            raise InputError("save_delta needs the backbone: params, or its hash as backbone=")
        backbone = backbone_hash(tuned, variables, params)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays, same = _once({path: _host(leaf) for path, leaf in flatten_dict(dict(variables), sep="/").items()})
    data = to_bytes(arrays)
    digest = hashlib.sha256(data).hexdigest()
    name = f"delta-{digest[:12]}.safetensors"
    header = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": backbone,
        "entries": [_entry_to_json(entry) for entry in tuned.entries],
        "exclude": [address.text for address in tuned.exclude],
        "tensors": {"file": name, "sha256": digest, "bytes": len(data), "same": same},
        "notes": dict(notes or {}),
    }
    try:
        text = json.dumps(header, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise InputError(
            f"{folder}: a method's fields and notes= are stored as JSON, numbers and text of Python ({error})"
        ) from None
    write_whole(folder / name, data)
    write_whole(folder / "delta.json", text.encode())
    for stale in set(folder.glob("delta-*.safetensors")) - {folder / name}:
        stale.unlink()
    return folder


def load_delta(
    folder: str | Path,
    model: Model | nn.Module,
    params: Mapping[str, Any],
    *,
    methods: Mapping[str, type[Method]] = METHODS,
) -> tuple[Tuned, dict[str, Any]]:
    """The tuned model and the variables stored in `folder`, for the backbone `params`.

    Arrays that the delta replaces in full (a classifier head) need not be those it was trained on. Raises
    `InputError` for a file that is missing, cut off or of another version, and for another backbone.
    """
    header = read_header(folder)
    entries = tuple(_entry_from_json(each, methods, Path(folder)) for each in header["entries"])
    tuned = Tuned(as_model(model), entries, tuple(Address(text) for text in header["exclude"]))
    variables = _read_tensors(Path(folder), header["tensors"])
    found = backbone_hash(tuned, variables, params)
    if found != header["backbone"]:
        raise InputError(
            f"{folder}: this delta belongs to backbone {header['backbone']}, the parameters given are {found}"
        )
    return tuned, variables


def read_header(folder: str | Path) -> dict[str, Any]:
    """What `delta.json` says: methods, addresses, backbone hash, notes."""
    path = Path(folder) / "delta.json"
    try:
        header = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a delta is a folder with delta.json in it") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path}: format is not {FORMAT!r}")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path}: version {header.get('version')} is not {VERSION}, the one this release reads"
        )
    _require_keys(path, {"notes": {}, **header}, HEADER)
    _require_keys(path, {"same": {}, **header["tensors"]}, TENSORS)
    for entry in header["entries"]:
        _require_keys(path, entry, ENTRY)
    for address in header["exclude"]:
        _require_keys(path, {"exclude": address}, {"exclude": str})
    return header


def _require_keys(path: Path, found: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{path}: {found!r} stands where an object should; the file is damaged")
    for name, kind in kinds.items():
        if name not in found:
            raise InputError(f"{path}: no {name!r} in it; the file is damaged")
        if not isinstance(found[name], kind):
            raise InputError(f"{path}: {name}={found[name]!r} is no {kind.__name__}; the file is damaged")


def backbone_hash(tuned: Tuned, variables: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """The digest of those arrays of `params` of which the tuned model still uses anything."""
    # Imported here: training needs optax and orbax, which delta tuning itself does without.
    from ..training.fingerprint import combined

    flat = {path: node_at(params, path) for path in leaf_paths(params)}
    hits = tuned.hits(variables, params)
    for (path, entry), hit in hits.items():
        if isinstance(entry.method, LeafMethod) and entry.method.replaces and hit.rows is None:
            flat.pop(path, None)
    return combined(flat)


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    assert dataclasses.is_dataclass(entry.method)
    fields = dataclasses.asdict(entry.method)
    return {"name": entry.name, "address": entry.address.text, "method": entry.method.name, "fields": fields}


def _entry_from_json(entry: dict[str, Any], methods: Mapping[str, type[Method]], folder: Path) -> Entry:
    if entry["method"] not in methods:
        raise InputError(f"{folder}: unknown delta method {entry['method']!r}; known: {', '.join(methods)}")
    try:
        method = methods[entry["method"]](**entry["fields"])
    except TypeError as error:
        raise InputError(
            f"{folder}: method {entry['method']!r} does not take its stored fields ({error})"
        ) from None
    return Entry(entry["name"], Address(entry["address"]), method)


def _read_tensors(folder: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / said["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, but delta.json names it") from None
    if len(data) != said["bytes"]:
        raise InputError(f"{path}: has {len(data)} bytes, should have {said['bytes']}; the file is truncated")
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        raise InputError(f"{path}: contents differ from the sha256 in delta.json; the file is damaged")
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    flat = {name: _array(tensor) for name, tensor in tensors}
    for name, first in said.get("same", {}).items():
        if first not in flat:
            raise InputError(f"{path}: no {first!r} in it, which delta.json names; the file is damaged")
        flat[name] = jnp.array(flat[first], copy=True)  # memory of its own, as at initialisation
    return {"delta": {}, "delta_state": {}, **unflatten_dict(flat, sep="/")}


def _once(flat: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays without the state that equals an earlier one's bit by bit, and which one it equals.

    VeRA's matrices are the same at all sites of one shape.
    """
    first: dict[tuple, str] = {}
    kept, same = {}, {}
    for path, leaf in flat.items():
        if path.startswith("delta_state/") and leaf.ndim:
            content = leaf.dtype, leaf.shape, hashlib.sha256(leaf.tobytes()).digest()
            if (earlier := first.setdefault(content, path)) != path:
                same[path] = earlier
                continue
        kept[path] = leaf
    return kept, same


def _array(tensor: Mapping[str, Any]) -> Any:
    dtype = jnp.dtype(DTYPES[tensor["dtype"]])
    return jnp.asarray(np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]))


def _host(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, order="C")


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, also when the machine stops."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
