"""`adapter_config.json`, read to its last key and written with few.

Which modules an adapter has is read from its tensors, so the keys that choose modules are passed over. A key
that changes what an adapter computes, and that its kind does not know, is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .... import InputError

CONFIG = "adapter_config.json"
# Bookkeeping, what trains an adapter, and which modules it has (its tensors say so too).
PASSED_OVER = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    ]
)
EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})


class Config:
    """The values of an adapter's configuration: each is taken, or refused unless it says nothing."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = dict(values)
        self._read: set[str] = set(PASSED_OVER)

    @classmethod
    def open(cls, folder: Path) -> Config:
        """Read the file; raises `InputError` for a folder or file that cannot be read."""
        path = folder / CONFIG
        if not path.is_file():
            raise InputError(f"{path}: no such file; a PEFT adapter is a folder with {CONFIG} in it")
        try:
            values = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
            raise InputError(f"{path}: has no 'peft_type'; it is no adapter's configuration")
        return cls(path, values)

    @property
    def kind(self) -> str:
        """PEFT's name of the method: `LORA`, `IA3`, ..."""
        return self.values["peft_type"]

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`; raises `InputError` for one of another type than the default's."""
        self._read.add(key)
        value = self.values.get(key, default)
        if value is None or default is None:
            return default if value is None else value
        valid = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, valid) or isinstance(value, bool) != isinstance(default, bool):
            raise InputError(
                f"{self.path}: {key}={value!r}; a value of type {type(default).__name__} is valid"
            )
        return value

    def require(self, key: str, *valid: Any) -> None:
        """Raise `InputError` unless the value is absent or one of `valid`."""
        self._read.add(key)
        value = self.values.get(key, valid[0])
        if value not in valid:
            raise InputError(
                f"{self.path}: {key}={value!r} is not supported; valid: {', '.join(map(repr, valid))}"
            )

    def ignore(self, *keys: str) -> None:
        """Note keys that change nothing here: how an adapter starts or is trained."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise `InputError` for the keys that nobody read and that say something."""
        left = {key: value for key, value in self.values.items() if key not in self._read}
        said = [f"{key}={_short(value)}" for key, value in left.items() if value not in EMPTY]
        if said:
            raise InputError(f"{self.path}: {'; '.join(said)}: not supported for {self.kind}")


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for `module` of a `rank_pattern`: keys are expressions that match the end of a name."""
    for pattern, value in patterns.items():
        if _expression(rf"(.*\.)?({pattern})$", pattern).match(module):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{CONFIG}: the pattern {pattern!r} gives {value!r}; a number is valid")
            return value
    return default


def named_in(names: Any, module: str) -> bool:
    """Whether a list of ends of names, or a regular expression for whole names, names `module`."""
    if isinstance(names, str):
        return _expression(names, names).fullmatch(module) is not None
    if not isinstance(names, list | None):
        raise InputError(f"{CONFIG}: {names!r} names no modules; a list or a regular expression is valid")
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _expression(text: str, shown: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"{CONFIG}: the pattern {shown!r} is no regular expression ({error})") from None


def written(kind: str, task: str | None, base: str, keys: Mapping[str, Any]) -> str:
    """The text of the file: `keys` and what every adapter has."""
    values = {
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "peft_type": kind,
        "task_type": task,
        **keys,
    }
    return json.dumps(_plain(values), indent=2, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    """Whole numbers as integers, as other readers of these files expect an alpha to be."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def most_common(values: Collection[Any]) -> Any:
    """The value that most have; the first of those, so that the file does not depend on chance."""
    return max(values, key=list(values).count)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
