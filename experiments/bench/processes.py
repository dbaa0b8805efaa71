"""The other end of a worker's pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Protocol, Self


class Job(Protocol):
    """What a contender is to do."""

    def to_json(self) -> str:
        """All of it, for its process."""


class Worker:
    """A contender in a process of its own; a context manager that ends it.

    `loaded` is the process's resident memory in bytes when it was ready, before its first step.
    JAX in it uses `platforms` (None: what is found) and, where `threads` is not 0, that many processors.
    What it prints goes to standard error.
    """

    def __init__(self, name: str, job: Job, threads: int = 0, platforms: str | None = "cpu") -> None:
        # -P: the current folder, perhaps our checkout, must not stand before the installed packages
        module = f"{__package__}.worker"
        command = [sys.executable, "-P", "-m", module, name, job.to_json(), str(threads)]
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({} if platforms is None else {"JAX_PLATFORMS": platforms})},
        )
        started = self._answer()
        self.versions: str = started["versions"]
        self.loaded: int = started["loaded"]

    def round(self, steps: int) -> dict[str, float]:
        """Train for `steps`: `loss`, and `wall` and `cpu` seconds."""
        return self.ask(what="round", steps=steps)

    def product(self, sizes: tuple[int, int, int]) -> dict[str, float]:
        """`wall` and `cpu` seconds of a matrix product `[m, k] x [k, n]`."""
        return self.ask(what="product", sizes=sizes)

    def peak_memory(self) -> int:
        """Bytes that the process had in memory at most since it was asked last."""
        return self.ask(what="memory")["peak"]

    def ask(self, **command: Any) -> dict[str, Any]:
        """The worker's reply to a command."""
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"the process of {self.name} ended with code {code}; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
