"""The folder of a published model: `config.json` and one or several safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from .container import DTYPES, Stored, damaged, map_file, read_header, view
from .mapping import Index, Shape

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights in other forms, and other models' weights beside these, stay where they are.
HUB_FILES = (
    CONFIG,
    "generation_config.json",
    SINGLE,
    "model-*.safetensors",
    INDEX,
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


class TensorFiles:
    """The tensors of a folder by name, read lazily, and `settings`, its config.json."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self._tensors = dict(tensors)
        self._mapped: dict[Path, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Read the headers; raises `InputError` for a folder, or a file in it, that cannot be used."""
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give the folder that holds {CONFIG} and {SINGLE}")
        settings = read_json(folder / CONFIG)
        index = folder / INDEX
        if index.exists():
            return cls(folder, settings, _sharded(index))
        if not (folder / SINGLE).exists():
            raise _no_tensors(folder)
        return cls(folder, settings, read_header(folder / SINGLE))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors' names."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor; raises `InputError` for one that numpy does not know."""
        code = self._tensors[name].code
        if code not in DTYPES:
            valid = ", ".join(DTYPES)
            raise InputError(f"tensor {name!r} has type {code}, which cannot be read; valid: {valid}")
        return DTYPES[code]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or a part, as a view of the mapped file: copy what is to be kept."""
        self.dtype(name)  # raises for a type that cannot be read
        tensor = self._tensors[name]
        if tensor.path not in self._mapped:
            self._mapped[tensor.path] = map_file(tensor.path)
        return view(self._mapped[tensor.path], tensor, index)


def locate(path_or_name: str | Path, revision: str = "", files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a model: a folder as it is, or a name of the Hugging Face hub, fetched.

    Of the hub's files are fetched those that `files` names, as they are at a `revision` (a commit, tag or
    branch; "": the latest). A local folder has no revisions.

    Raises `InputError` where there is neither, where `huggingface_hub` is not installed and where the hub
    cannot be reached and has not been before.
    """
    path = Path(path_or_name).expanduser()
    if path.exists() or isinstance(path_or_name, Path) or not HUB_NAME.fullmatch(str(path_or_name)):
        if revision:
            raise InputError(f"revision={revision!r} is of a name on the hub; {path} is a local folder")
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{path_or_name!r} is no local folder; for a name of the hub: pip install huggingface_hub"
        ) from error
    try:
        name = str(path_or_name)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # the hub's own, its transport's and the operating system's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path_or_name!r} is no local folder and the Hugging Face hub does not give it: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `InputError` for a file that is absent or is none."""
    if not path.exists():
        raise InputError(f"{path.parent} has no {path.name}; it is needed beside the safetensors files")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object")
    return value


def _sharded(index: Path) -> dict[str, Stored]:
    """The tensors that an index names, each in the file that it names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise damaged(index, "it has no weight_map")
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not (index.parent / name).exists()]
    if missing:
        raise InputError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
    headers = {name: read_header(index.parent / name) for name in shards}
    lost = [tensor for tensor, shard in places.items() if tensor not in headers[shard]]
    if lost:
        raise damaged(index, f"the files do not hold {listed(lost)}, which it names")
    unnamed = [tensor for header in headers.values() for tensor in header if tensor not in places]
    if unnamed:
        raise damaged(index, f"it does not name {listed(unnamed)}, which the files hold")
    return {tensor: headers[shard][tensor] for tensor, shard in places.items()}


def listed(names: list[str], most: int = 20) -> str:
    """Names with commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _no_tensors(folder: Path) -> InputError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    convert = (
        "convert once, where PyTorch is and the source is trusted: from transformers import AutoModel; "
        "AutoModel.from_pretrained(OLD).save_pretrained(NEW), with the class that config.json names"
    )
    if pickles:
        return InputError(
            f"{folder} holds {listed(pickles)}: pickles may run any code when opened: none is read; {convert}"
        )
    there = f" (it holds {listed(others)})" if others else ""
    return InputError(f"{folder} has neither {SINGLE} nor {INDEX}{there}; {convert}")
