"""A run is a folder: what was asked, where it ran, what was measured on the way and at the end.

    config.json        identity, resolved configuration, seed, data fingerprint, revision
    environment.json   versions, platform, devices, git state of the code
    metrics.jsonl      one record a line, cut back to the checkpoint's step when a run is resumed
    checkpoints/       written by the training loop
    result.json        the measured values; its presence means that the run is finished

The folder's name is a hash of what was asked, so asking for the same run twice finds the first one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ... import InputError
from .configs import encode, flatten
from .environment import code_difference, describe_environment
from .records import MetricsLog

logger = logging.getLogger(__name__)

State = Literal["new", "resumed", "finished"]
CONFIG, ENVIRONMENT, METRICS, RESULT = "config.json", "environment.json", "metrics.jsonl", "result.json"
TREE = "tree.txt"  # what a delta tunes


def run_id(config: Any, seed: int, data_fingerprint: str = "", revision: int = 1) -> str:
    """Twelve hexadecimal digits that name what was asked: equal for equal questions, on any machine.

    `revision` is the study's own count of changes that make earlier results incomparable.
    """
    text = json.dumps(_question(config, seed, data_fingerprint, revision), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_name(name: str, config: Any, seed: int, data_fingerprint: str = "", revision: int = 1) -> str:
    """`name` and the beginning of the run's identity: a folder that a person can find."""
    return f"{name}-{run_id(config, seed, data_fingerprint, revision)[:6]}"


@dataclass(frozen=True)
class Run:
    """An opened run folder. `state` says what was found there; `result` is what a finished run measured.

    Where several processes share the folder only one may write: the others open it with `write=False`, after
    the writing process has opened it.
    """

    folder: Path
    identity: str
    state: State
    write: bool = True

    @classmethod
    def open(
        cls,
        root: str | Path,
        config: Any,
        *,
        seed: int = 0,
        data_fingerprint: str = "",
        revision: int = 1,
        name: str | None = None,
        devices: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> Self:
        """The run of this question under `root`: created, or found and resumed, or found finished.

        The folder is `root/name`, without a name `root/<run id>`. `devices` (such as `{"platform": "cpu",
        "count": 8}`) is recorded in the environment. A folder that holds another question's run, or something
        that is not a run, raises InputError and is left as it is.
        """
        identity = run_id(config, seed, data_fingerprint, revision)
        folder = Path(root) / (name or identity)
        question = _question(config, seed, data_fingerprint, revision)
        state = _find(folder, identity, question)
        if state == "new" and write:
            _create(folder, {"id": identity, **question}, devices)
        elif state != "new":
            _say_what_was_found(folder, state)
        return cls(folder, identity, state, write)

    @property
    def checkpoints(self) -> Path:
        """Folder for the training loop's checkpoints; not created here."""
        return self.folder / "checkpoints"

    @property
    def result(self) -> dict[str, Any]:
        """The measured values of a finished run; InputError for an unfinished one."""
        if not (self.folder / RESULT).exists():
            raise InputError(f"{self.folder}: the run is not finished, there is no {RESULT}")
        return read_json(self.folder / RESULT)

    def metrics(self, resume_step: int | None = None) -> MetricsLog:
        """The run's metrics file, open for appending.

        `resume_step` is the step of the checkpoint that training goes on from (0 or None: from the start);
        records of later steps, which a killed run left behind, are removed.
        """
        return MetricsLog.open(self.folder / METRICS, resume_step or 0, write=self.write)

    @contextmanager
    def unless_refused(self) -> Iterator[Self]:
        """Where input is refused before anything was measured, the folder goes again if it was new.

        Else the corrected command would find another question's run in its way.
        """
        try:
            yield self
        except InputError:
            if self.state == "new" and self.write and not self._has_measured():
                _remove(self.folder)
            raise

    def _has_measured(self) -> bool:
        metrics = self.folder / METRICS
        return self.checkpoints.exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Store the measured values; from now on the run is finished."""
        if self.write:
            write_atomically(self.folder / RESULT, _json(result))


def run_folders(root: str | Path) -> Iterator[Path]:
    """The run folders at or under `root`, sorted by path; a run's own sub-folders are not searched."""
    root = Path(root)
    if (root / CONFIG).is_file():
        yield root
        return
    for child in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield from run_folders(child)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either wholly there or as it was, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError with the path where it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}; a run's files hold JSON objects")
    return data


def _question(config: Any, seed: int, data_fingerprint: str, revision: int) -> dict[str, Any]:
    return {
        "config": encode(config),
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "revision": revision,
    }


def _find(folder: Path, identity: str, question: Mapping[str, Any]) -> State:
    """What stands at `folder`; InputError where it is not this question's run."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            what = "this" if place == folder else str(place)
            raise InputError(f"{folder}: a run is a folder, but {what} is a file; choose another place")
    if not (folder / CONFIG).exists():
        if strangers := _strangers(folder):
            raise InputError(f"{folder}: holds {strangers[0]!r} and no run; choose a new or an empty folder")
        return "new"
    found = read_json(folder / CONFIG)
    if found.get("id") != identity:
        raise InputError(
            f"{folder}: holds another run ({_differences(found, question)}); choose another folder"
        )
    return "finished" if (folder / RESULT).exists() else "resumed"


def _strangers(folder: Path) -> list[str]:
    """What a killed creation cannot have left in a folder without a configuration."""
    if not folder.exists():
        return []
    return sorted(p.name for p in folder.iterdir() if p.name != ENVIRONMENT and not p.name.startswith("."))


def _differences(found: Mapping[str, Any], question: Mapping[str, Any], shown: int = 3) -> str:
    theirs, ours = flatten(found), flatten(question)
    names = [name for name in sorted({*theirs, *ours} - {"id"}) if theirs.get(name) != ours.get(name)]
    if not names:
        return "its identity was computed differently"
    texts = [f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names[:shown]]
    more = [f"{len(names) - shown} more differences"] if len(names) > shown else []
    return ", ".join(texts + more)


def _remove(folder: Path) -> None:
    """Take away what was made in a new run's folder; hidden files, which it may have had before, stay."""
    (folder / CONFIG).unlink(missing_ok=True)  # first: without it the rest is no run
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            shutil.rmtree(path)
        elif not path.name.startswith("."):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _create(folder: Path, question: Mapping[str, Any], devices: Mapping[str, Any] | None) -> None:
    """Configuration last: a folder that has one is whole, whenever the process was killed."""
    write_atomically(folder / ENVIRONMENT, _json(describe_environment(devices)))
    write_atomically(folder / CONFIG, _json(question))


def _say_what_was_found(folder: Path, state: State) -> None:
    if state == "finished":
        logger.info("%s: already finished, nothing to do (remove the folder to run it again)", folder)
    else:
        logger.info("%s: found unfinished, going on", folder)
    recorded = read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).exists() else {}
    if difference := code_difference(recorded.get("code")):
        logger.warning("%s: %s", folder, difference)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Numbers of array libraries as Python's, so that this module needs none of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON; give numbers, text, lists or objects")
