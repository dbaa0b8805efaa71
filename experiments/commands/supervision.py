"""One process of several, watched: what ends it is said in one line, also where XLA aborts.

`jax.distributed` ends every process of a run when one is lost, from C++: a stack trace, no Python. So the
command of such a run starts itself once more and waits. What its child writes goes on to standard error but
for XLA's log, of which the last error is told where a lost process ended the child, and all where it was
something else. A terminal is handed on beside, for the progress bar alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from types import FrameType

from ...parallel.processes import LOST_PROCESS, SUPERVISED, launched
from .progress import SCREEN

LOST = 75
"""The exit code where another process is gone: the same command may be started again (`EX_TEMPFAIL`)."""
LOG_LINE = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ .*\] ?(.*)$")
NEWS = re.compile(r"^\[Gloo\] Rank \d+ is connected")
CONTINUED = re.compile(r"^(\d+|The tasks have crashed.*|RPC: /xla\..*|)$")  # lines of an error of XLA's log
KEPT_LINES = 200  # of what is not written on


def is_one_of_several(arguments: Sequence[str]) -> bool:
    """Whether this command joins other processes and nobody watches it yet."""
    if SUPERVISED in os.environ:
        return False
    given = [value for name, value in _options(arguments) if name == "--processes"]
    if given:
        return given[-1] != "1"
    return launched()


def supervise(arguments: Sequence[str]) -> int:
    """Run the command in a process of its own; returns its exit code, `LOST` where another's end ended it."""
    environment, screen = os.environ | {SUPERVISED: "1"}, list[int]()
    if sys.stderr.isatty():
        screen = [os.dup(sys.stderr.fileno())]
        environment[SCREEN] = str(screen[0])
    child = subprocess.Popen(
        [sys.executable, "-m", "modicum", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=screen,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    for number in screen:
        os.close(number)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    assert child.stderr is not None
    kept = copy_messages(child.stderr)
    code = child.wait()
    if code in (-signal.SIGABRT, -signal.SIGSEGV):
        if any(LOST_PROCESS.search(line) for line in kept):
            print(f"modicum: error: {lost_line(last_error(kept))}", file=sys.stderr)
            return LOST
        sys.stderr.writelines(kept)
        print(f"modicum: error: ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def copy_messages(lines: Iterable[str]) -> list[str]:
    """Write lines on to standard error as they come, but for XLA's log; returns the last lines of that."""
    kept, error, aborting = deque[str](maxlen=KEPT_LINES), False, False
    for line in lines:
        logged = LOG_LINE.match(line)
        aborting = aborting or line.startswith(("*** Check failure", "    @ ", "Fatal Python error"))
        error = line[0] in "EF" if logged else error and CONTINUED.match(line.rstrip("\n")) is not None
        if logged or error or aborting or NEWS.match(line):
            kept.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    return list(kept)


def last_error(kept: Sequence[str]) -> str:
    """What the last error in XLA's log says."""
    logged = [match for line in kept if line[0] in "EF" and (match := LOG_LINE.match(line))]
    return next((match[1].strip() for match in reversed(logged) if match[1].strip()), "")


def lost_line(reason: str) -> str:
    """What is said of a run that lost a process."""
    words = " ".join(reason.split())[:160]
    return (
        "another process of this run is gone or never came, so this one ends"
        + (f" ({words})" if words else "")
        + "; start the command again, on as many processes as there are: it goes on from its last checkpoint"
    )


def _options(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(name, value) of `--name value` and `--name=value`."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        yield name, value if equals else "".join(arguments[place + 1 : place + 2])


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
