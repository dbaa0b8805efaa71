"""Data sets from the Hugging Face hub, or a readable line where it cannot be reached."""

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets

from ... import InputError

__all__ = ["load_from_hub", "quiet_datasets", "root_cause", "table_fingerprint"]


def load_from_hub(name: str, splits: Sequence[str], cache: Path | None) -> tuple[datasets.Dataset, str]:
    """The first of `splits` that the hub data set `owner/name[:configuration]` has, and its fingerprint.

    Raises:
        InputError: where the hub cannot be reached, has no such data set, or that has none of the splits.
    """
    repository, _, configuration = name.partition(":")
    folder = str(cache) if cache is not None else None
    try:
        with quiet_datasets(), _offline_if_unreachable():
            found = datasets.load_dataset(repository, configuration or None, cache_dir=folder)
    except Exception as error:
        raise InputError(
            f"{name}: no such file or folder here, and the hub has not given it: {root_cause(error)}"
        ) from error
    for split in splits:
        if split in found:
            return found[split], table_fingerprint(found[split])
    raise InputError(f"{name}: no split {' or '.join(splits)}; there is: {', '.join(found)}")


def table_fingerprint(rows: datasets.Dataset) -> str:
    """The digest of the column names and values of `rows`, whatever their files and chunks."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=_as_text).encode() + b"\n")
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` unless on a terminal, and no news below an error."""
    hub, verbosity = logging.getLogger("huggingface_hub"), datasets.logging.get_verbosity()
    level, bars = hub.level, not datasets.are_progress_bars_disabled()
    hub.setLevel(logging.ERROR)
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def root_cause(error: BaseException) -> str:
    """The first line of the exception that `error` was raised from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Read the hub's cache at once where its name does not resolve: it would retry for half a minute."""
    import huggingface_hub.constants

    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not _resolves(host):
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _resolves(host: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # then the proxy resolves it
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _as_text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
