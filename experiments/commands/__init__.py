"""The command line: one file a verb, each a frozen dataclass with a `run` method.

Verbs import jax only when they run, so that `modicum --help` is instant. Adding one takes a file and a
line in `verbs`.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from ... import InputError, __version__

USAGE_ERROR = 2
INTERRUPTED = 130


class Verb(Protocol):
    """What a subcommand is."""

    def run(self) -> int:
        """Do it and return the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `modicum`; returns the exit code.

    What a user can mend is one line on standard error and exit code 2; `--debug` shows where it arose.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"modicum {__version__}")
        return 0
    # Without arguments of a caller this process is ours. Help needs no jax.
    helped = not {"-h", "--help"}.isdisjoint(given)
    if (
        arguments is None and given[:1] in (["train"], ["tune"]) and not helped
    ):  # this process is ours, and it trains
        from .supervision import is_one_of_several, supervise

        if is_one_of_several(given):
            return supervise(given)
        from ...research.training.host_memory import keep_freed_memory

        keep_freed_memory()
    debug = "--debug" in given
    logging.basicConfig(level=logging.WARNING, format="modicum: %(message)s")
    try:
        return parse([argument for argument in given if argument != "--debug"]).run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if is_lost(error):
            end_at_once(error)
        if not isinstance(error, InputError | OSError) or getattr(error, "filename", "") is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"modicum: error: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process of this run is gone."""
    if isinstance(error, InputError | OSError) or "jax" not in sys.modules:
        return False
    from ...parallel.processes import is_lost_process

    return is_lost_process(error)


def end_at_once(error: Exception) -> NoReturn:
    """Say that a process is gone, and end without waiting for it, as `jax.distributed` does at an exit."""
    from .supervision import LOST, lost_line

    sys.stdout.flush()
    print(f"modicum: error: {lost_line(str(error))}", file=sys.stderr, flush=True)
    os._exit(LOST)


def one_line(error: Exception) -> str:
    """What is said of an error; of one the system raised (a full disk, a closed folder), where and what."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def parse(arguments: Sequence[str]) -> Verb:
    """The verb with its options filled in; unusable arguments end the program with code 2."""
    import tyro

    return tyro.extras.subcommand_cli_from_dict(
        verbs(),
        prog="modicum",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def verbs() -> dict[str, Callable[..., Verb]]:
    """Verb by name, in the order of the help page."""
    from .bench import Bench
    from .evaluate import Evaluate
    from .generate import Generate
    from .neurons import Neurons
    from .plan import Plan
    from .quickstart import Quickstart
    from .report import Report
    from .sparsity import Sparsity
    from .study import Study
    from .train import Train
    from .tune import Tune

    return {
        "quickstart": Quickstart,
        "train": Train,
        "tune": Tune,
        "evaluate": Evaluate,
        "generate": Generate,
        "sparsity": Sparsity,
        "neurons": Neurons,
        "study": Study,
        "report": Report,
        "bench": Bench,
        "plan": Plan,
    }


DESCRIPTION = (
    "The small part of a large model that matters: tune under 1% of the parameters, see which neurons "
    "fire. `modicum quickstart` shows it all in minutes. --debug shows tracebacks, --version the version."
)
