"""`save_pretrained`: a model and its parameters as a folder that `transformers` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ... import InputError
from ..costs import abstract_parameters
from ..heads import ClassifierHead
from ..model import Params
from ..transformer import Transformer
from . import registry
from .alike import described
from .assemble import their_tensors
from .container import CODES, Tensor, write_file
from .family import Family
from .files import CONFIG, INDEX, SINGLE, listed
from .mapping import place
from .settings import GENERIC, Settings

MAX_SHARD_BYTES = 5 * 10**9


def save_pretrained(
    folder: str | Path,
    model: Transformer,
    params: Params,
    *,
    architecture: str = "",
    settings: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write config.json and the tensors, in several files with an index where they exceed `max_shard_bytes`.

    `architecture` is the class in `transformers` that is to load the folder; by default that of `settings`,
    which are those of the model that was loaded: what they hold beside the model's shape (token numbers,
    labels) is handed through. Tensors keep the parameters' types; a scanned stack is spread into layers and a
    padded vocabulary loses its padding. The folder appears when it is complete. An existing one that is not
    empty is replaced only with `overwrite`; other files in it (a tokenizer) then stay.

    Raises `InputError` for a model that the architecture cannot express, or parameters that are not its own.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise InputError(f"{folder} exists and is not empty; choose another folder or give overwrite=True")
    name = architecture or next(iter((settings or {}).get("architectures") or []), "")
    if not name:
        raise InputError("give architecture=, the class in transformers that is to load the folder")
    family = registry.family_of(name)
    _check_leaves(model, params)
    written = _settings(family, name, model, params, settings or {})
    tensors = list(_tensors(family, name, model, params))
    with _appearing(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")
        _write(temporary, tensors, max_shard_bytes)
    return folder


def _check_leaves(model: Transformer, params: Params) -> None:
    """Raise `InputError` where the parameters are not the model's."""
    valid = {path: tuple(x.shape) for path, x in flatten_dict(abstract_parameters(model), sep="/").items()}
    flat = flatten_dict(params, sep="/")
    found = {path: tuple(np.shape(x)) for path, x in flat.items()}
    problems = [f"{path} is missing" for path in valid if path not in found]
    problems += [f"{path} is not the model's" for path in found if path not in valid]
    both = (path for path in valid if path in found and found[path] != valid[path])
    problems += [f"{path} {list(found[path])} (valid: {list(valid[path])})" for path in both]
    away = (path for path, x in flat.items() if isinstance(x, jax.Array) and not x.is_fully_addressable)
    problems += [f"{path} lies on other processes too" for path in away]
    codes = {path: np.dtype(x.dtype) for path, x in flat.items()}
    problems += [f"{path} has type {kind}" for path, kind in codes.items() if kind not in CODES]
    if problems:
        raise InputError(f"the parameters cannot be saved as this model's: {listed(problems)}")


def _settings(
    family: Family, name: str, model: Transformer, params: Params, carried: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of config.json, read once more to make sure that they describe this model.

    Those that were carried along stay as they are where they still do.
    """
    kind = np.dtype(jax.tree.leaves(params)[0].dtype).name
    own = {"architectures": [name], "model_type": family.name, "dtype": kind, "torch_dtype": kind}
    same = carried.get("model_type") == family.name
    kept = {key: value for key, value in carried.items() if same or key in GENERIC}
    values = {**kept, **_labels(model, carried), **own}
    if same and not _differences(family, name, model, values):
        return values
    values |= family.write(model.config, name)
    wrong = _differences(family, name, model, values)
    if wrong:
        raise InputError(f"{name} cannot express this model: {'; '.join(wrong)}")
    return values


def _differences(family: Family, name: str, model: Transformer, values: Mapping[str, Any]) -> list[str]:
    """What of the model reads otherwise in these values of config.json."""
    settings = Settings(values)
    head, config = family.head(name, settings), family.read(settings)
    if head != model.head:
        raise InputError(f"{name} ends in {head}, the model in {model.head}; give another architecture=")
    mine, back = described(model.config), described(config)
    return [
        f"{field}={mine[field]} (would be read as {back.get(field)})"
        for field in mine
        if mine[field] != back.get(field)
    ]


def _labels(model: Transformer, carried: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a classifier's labels: those it was loaded with, as long as there are as many."""
    if not isinstance(model.head, ClassifierHead) or len(carried.get("id2label") or {}) == model.head.labels:
        return {}
    names = [f"LABEL_{index}" for index in range(model.head.labels)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _tensors(family: Family, name: str, model: Transformer, params: Params) -> Iterator[Tensor]:
    """Their tensors under the names that the architecture has."""
    leaves = place(family.entries(model.config, model.head), model.config)
    for tensor in their_tensors(leaves, params):
        prefix = next((p for p in family.prefixes if p and tensor.name.startswith(p)), "")
        yield replace(tensor, name=tensor.name[len(prefix) :]) if name in family.bare else tensor


def _write(folder: Path, tensors: Sequence[Tensor], max_shard_bytes: int) -> None:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.bytes for one in shards[-1]) + tensor.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard)
        places |= {tensor.name: file for tensor in shard}
    total = sum(tensor.bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside, which takes the folder's place at the end, or vanishes after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number that was killed
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            _keep_others(folder, temporary)
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _keep_others(folder: Path, temporary: Path) -> None:
    """Copy what is not replaced."""
    for path in folder.iterdir():
        if path.name in (CONFIG, INDEX) or path.suffix == ".safetensors":
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, temporary / path.name)
