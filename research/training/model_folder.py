"""A trained model as a folder: JSON and safetensors, nothing that runs code when read.

model.json               the configuration, the head, for a classifier the names of its labels, and notes
parameters.safetensors   arrays by `/` path
tokenizer.json           where there is one
tokenizer/               a published model's own tokenizer files instead, where it was tuned
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from ... import InputError, models
from ...models.costs import abstract_parameters
from ...models.heads import ClassifierHead
from ...models.model import Params
from ...models.transformer import Transformer
from ..study.configs import decode, encode, names_in

if TYPE_CHECKING:
    from ..data.tokenizers import Tokenizer

DESCRIPTION, PARAMETERS, TOKENIZER = "model.json", "parameters.safetensors", "tokenizer.json"
PUBLISHED = "tokenizer"
FORMAT = 1


@dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters, and how text becomes its input.

    `tokenizer` is a file of ours, or a folder with a published model's files.
    """

    model: Transformer
    params: Params
    labels: tuple[Any, ...] = ()
    tokenizer: Path | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def save_model(
    folder: Path,
    model: Transformer,
    params: Params,
    *,
    tokenizer: Tokenizer | Path | None = None,
    labels: Sequence[Any] = (),
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder whole or not at all; a model that is there already is replaced.

    `tokenizer` may be a published model's folder, of which the tokenizer's files are copied. `notes` are JSON
    of your own.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    description = {
        "format": FORMAT,
        "config": encode(model.config),
        "head": encode(model.head),
        "labels": list(labels),
        "notes": dict(notes or {}),
    }
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    save_file(flatten_dict(jax.device_get(params), sep="/"), str(partial / PARAMETERS))
    if isinstance(tokenizer, Path):
        _copy_tokenizer(tokenizer, partial / PUBLISHED)
    elif tokenizer is not None:
        tokenizer.save(partial / TOKENIZER)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_model(folder: Path) -> TrainedModel:
    """Read what `save_model` wrote.

    Raises `InputError` for a folder without a model, an unreadable file, and parameters that are not
    those of the configuration.
    """
    description = _read_description(folder)
    named = names_in(models)
    model = Transformer(decode(description["config"], named), decode(description["head"], named))
    try:
        flat = load_file(str(folder / PARAMETERS))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / PARAMETERS} cannot be read: {error}") from None
    params = unflatten_dict(flat, sep="/")
    require_parameters(model, params, str(folder / PARAMETERS))
    tokenizer = next((each for each in (folder / TOKENIZER, folder / PUBLISHED) if each.exists()), None)
    return TrainedModel(model, params, tuple(description["labels"]), tokenizer, description.get("notes", {}))


def load_tokenizer(trained: TrainedModel, source: Path) -> Tokenizer:
    """The model's tokenizer; raises `InputError` naming `source` where none was stored with it."""
    from ..data.tokenizers import Tokenizer

    if trained.tokenizer is None:
        raise InputError(f"{source} has no {TOKENIZER}, so texts cannot be encoded for it")
    return Tokenizer.load(trained.tokenizer)


def _copy_tokenizer(source: Path, target: Path) -> None:
    from ...models.pretrained.tokenizers.load import FILES, SETTINGS

    target.mkdir(parents=True)
    for name in {*FILES, *SETTINGS}:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def find_model(path: Path) -> Path:
    """The model folder at `path`: itself, or the `model` of a finished run."""
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION).is_file():
            return folder
    if not path.exists():
        raise InputError(f"{path} does not exist; give a model folder or a finished run of `modicum train`")
    raise InputError(
        f"{path} holds no {DESCRIPTION}; give a model folder or a finished run of `modicum train`"
    )


def require_parameters(model: Transformer, params: Params, source: str) -> None:
    """Raise `InputError` naming the first array that the configuration does not have like this."""
    abstract = abstract_parameters(model)
    expected = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    found = {path: np.shape(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            have, want = found.get(path, "missing"), expected.get(path, "no such array")
            raise InputError(f"{source}: array {path!r} is {have}, the configuration says {want}")


def with_classifier(trained: TrainedModel, head: ClassifierHead, seed: int) -> tuple[Transformer, Params]:
    """The trained body under a fresh classifier: the same arrays, plus `classifier/...` drawn from `seed`."""
    model = Transformer(trained.model.config, head)

    def classifier(rng: jax.Array) -> Params:
        return model.init(rng, jnp.zeros((1, 2), jnp.int32))["classifier"]  # the compiler drops the rest

    names = set(abstract_parameters(model)) - {"classifier"}
    body = {name: tree for name, tree in trained.params.items() if name in names}
    return model, {**body, "classifier": jax.jit(classifier)(jax.random.key(seed))}


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from None
    if not isinstance(description, dict):
        raise InputError(f"{path}: holds a {type(description).__name__}; a model is described by an object")
    if description.get("format") != FORMAT:
        raise InputError(f"{path}: format {description.get('format')!r}; this version reads {FORMAT}")
    if missing := sorted({"config", "head", "labels"} - set(description)):
        raise InputError(f"{path}: no {missing[0]!r} in it; the file is damaged")
    return description
