"""What a run depends on besides its configuration: versions, machine, and the state of this code."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "datasets", "grain", "tokenizers", "numpy")
ROOT = Path(__file__).resolve().parents[2]


def describe_environment(devices: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions, operating system, processors and git state; `devices` is what the caller knows of them."""
    return {
        "modicum": __version__,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "devices": dict(devices or {}),
        "code": code_state(),
    }


def code_state(root: Path = ROOT) -> dict[str, str] | None:
    """The commit this package was checked out at and a hash of what was edited since ("" for nothing).

    None where the package is not the root of a git work tree, as in an installed wheel.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root:
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", "*.py")
    untracked = [root / line[3:] for line in (changed or "").splitlines() if line.startswith("??")]
    parts = [_git(root, "diff", "HEAD", "--", "*.py") or ""]
    parts += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in untracked if path.is_file()]
    edits = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12] if changed else ""
    return {"commit": commit, "edits": edits}


def code_difference(recorded: Mapping[str, str] | None) -> str:
    """One sentence on how the code differs from the recorded state; "" where it does not or nobody knows."""
    current = code_state()
    if recorded is None or current is None or dict(recorded) == current:
        return ""
    then, now = recorded.get("commit", "")[:10], current["commit"][:10]
    if then != now:
        return f"the run was made by the code at commit {then}, this is {now}; results may differ"
    return f"the code was edited (at commit {now}) since this run was made; results may differ"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no answer in five seconds."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=5, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").rstrip("\n")
