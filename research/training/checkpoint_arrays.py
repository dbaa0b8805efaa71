"""A checkpoint's arrays on disk: how orbax is asked to write and to read them, and the check afterwards.

They are stored as nested dicts named by their paths, whatever containers the state is made of, and
read onto targets: an abstract array with a sharding, or a numpy array for what stays on the host.
What orbax cannot store is handled here: typed random keys are stored as their words, and arrays
without elements not at all.
"""

import contextlib
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from .checkpoint_record import Record, Unreadable, is_array
from .fingerprint import fingerprint, leaf_paths

__all__ = ["empty_array", "nested", "read_arrays", "stored_tree"]


def read_arrays(folder: Path, targets: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """The arrays at the paths of `targets`, checked against the record's fingerprints.

    Raises:
        Unreadable: on every process alike, so that all turn to the same other step.
    """
    full = {path: _data_target(leaf) for path, leaf in targets.items() if math.prod(leaf.shape)}
    arrays, reason = _try_reading(folder / "state", full)
    if not _all_processes(reason is None):
        raise Unreadable(reason or "another process could not read it")
    arrays = {path: _as_wanted(leaf, arrays.get(path)) for path, leaf in targets.items()}
    found = fingerprint(arrays)
    wrong = [path for path in targets if found[path] != record.fingerprints[path]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Unreadable(f"the contents of {wrong[0]}{more} do not match their fingerprint")
    return arrays


def _try_reading(folder: Path, targets: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The arrays, or why they cannot be read: damage surfaces in orbax as any kind of exception."""
    if not targets:
        return {}, None
    request = ocp.args.PyTreeRestore(
        item=nested(targets, _stored_name),
        restore_args=nested({path: _restore_args(leaf) for path, leaf in targets.items()}, _stored_name),
        partial_restore=True,
    )
    with _without_orphans():
        try:
            tree = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder), args=request)
            found = {path: _at(tree, path) for path in targets}
            jax.block_until_ready(found)
        except Exception as error:
            gc.collect()  # the coroutines complain when they are collected,
            time.sleep(0.05)  # or when a read of theirs ends after the event loop
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            return {}, f"its arrays cannot be read ({first.split('. See full')[0][:200]})"
    wrong = [path for path, leaf in found.items() if not _same_kind(leaf, targets[path])]
    return found, f"{wrong[0]} has another shape or type on disk" if wrong else None


def _same_kind(array: Any, target: Any) -> bool:
    is_concrete = isinstance(array, jax.Array | np.ndarray)  # not the target itself, handed back
    return is_concrete and array.shape == target.shape and array.dtype == target.dtype


@contextlib.contextmanager
def _without_orphans() -> Iterator[None]:
    """Silence the coroutines that orbax abandons when one of them fails: the first failure is reported."""
    hook, events = sys.unraisablehook, logging.getLogger("asyncio")
    was_disabled = events.disabled
    sys.unraisablehook, events.disabled = lambda _: None, True
    try:
        yield
    finally:
        sys.unraisablehook, events.disabled = hook, was_disabled


def _data_target(leaf: Any) -> Any:
    """Where to restore `leaf`: a numpy array on the host, the words of a typed key, or a sharded struct."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if isinstance(sharding, NamedSharding):  # a key's words stay together
        padding = [None] * (len(leaf.shape) - len(sharding.spec))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *padding, None))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _as_wanted(target: Any, array: Any) -> Any:
    """Make typed keys of their words, and empty arrays, which orbax does not store, anew."""
    is_host = isinstance(target, np.ndarray | np.generic)
    if array is None:
        empty = np.zeros(target.shape, target.dtype)
        return empty if is_host else jax.device_put(empty, getattr(target, "sharding", None))
    if not is_host and jnp.issubdtype(target.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(target))
    return array


def _restore_args(target: Any) -> ocp.RestoreArgs:
    if isinstance(target, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=target.sharding, dtype=target.dtype, strict=True)


def stored_tree(state: Any) -> dict[str, Any]:
    """The arrays of `state` that orbax can store, as nested dicts named by their paths."""
    arrays = {path: leaf for path, leaf in leaf_paths(state).items() if is_array(leaf)}
    stored = {}
    for path, leaf in arrays.items():
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.size:
            stored[path] = (
                leaf if isinstance(leaf, jax.Array) else np.array(leaf)
            )  # a copy: the caller may go on
    return nested(stored, _stored_name) or {"nothing": np.zeros(1, np.int8)}  # orbax refuses an empty tree


def _stored_name(key: str) -> str:
    """`key` as orbax may join it to others with dots: `a.b` is not `b` in `a`."""
    return key.replace("%", "%25").replace(".", "%2E")


def nested(flat: Mapping[str, Any], name: Callable[[str], str] = str) -> dict[str, Any]:
    """Nested dicts of `flat`'s paths, each key of a path passed through `name`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, last = [name(key) for key in path.split("/")]
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree


def _at(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[_stored_name(key)]
    return tree


def empty_array(description: str) -> np.ndarray:
    """An uninitialised array as a checkpoint's record describes it (`bfloat16[8,16]`)."""
    name, _, sizes = description.removesuffix("]").partition("[")
    return np.empty([int(size) for size in sizes.split(",") if size], jnp.dtype(name))


def _all_processes(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))
