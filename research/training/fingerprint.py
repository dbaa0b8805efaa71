"""A fingerprint of a tree of arrays that does not depend on where the arrays live.

Orbax restores a file with a flipped bit without complaint, so every checkpoint carries a
fingerprint and is compared with it after loading. The same number is the "initial hash" of a run
and names the backbone that a delta belongs to.

Each array is read as 32-bit words x_0, x_1, … in row-major order (narrower elements take one word
each, 64-bit elements two) and reduced to two 32-bit lanes:

    a = Σ (2i + 1) · x_i                 mod 2³²
    b = Σ mix(x_i XOR mix(i + 1))        mod 2³²

The weights of lane a are odd and `mix` is a bijection of the 32-bit words, so either lane changes
whenever a single word changes: one flipped bit is always seen. Lane a alone would miss two swapped
floats whose bit patterns end in many zeros; lane b sees any such change but for one in 2³². Sums
modulo 2³² do not depend on the order of their terms, hence neither on the mesh nor on the number
of processes.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["combined", "fingerprint", "leaf_paths"]


def fingerprint(tree: Any) -> dict[str, str]:
    """The fingerprint of every leaf of `tree`: path (`layers_0/mlp/up/kernel`) -> 16 hexadecimal digits.

    Leaves may be sharded `jax.Array`s (typed random keys too), numpy arrays or Python numbers.
    """
    lanes = {path: _lanes(leaf) for path, leaf in leaf_paths(tree).items()}  # dispatched together,
    return {path: _hexadecimal(np.asarray(pair)) for path, pair in lanes.items()}  # then awaited


def combined(tree_or_fingerprints: Any) -> str:
    """One digest (16 hexadecimal digits) of a tree, or of what `fingerprint` returned for it.

    Besides the contents it covers the paths, but not the shapes and element types.
    """
    found = tree_or_fingerprints
    if not (isinstance(found, Mapping) and all(isinstance(value, str) for value in found.values())):
        found = fingerprint(found)
    lines = "".join(f"{path} {found[path]}\n" for path in sorted(found))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by their path, the keys joined by `/`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise ValueError("two leaves have one path; a key of the tree must not hold '/'")
    return leaves


def _lanes(leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return _reduction(_replicated(leaf.sharding))(leaf)
    return _reduction(None)(_host_words(np.asarray(leaf)))


def _replicated(sharding: jax.sharding.Sharding) -> NamedSharding | None:
    """Where the two lanes go: to every device of the mesh, so that each process can read them."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.lru_cache(maxsize=64)
def _reduction(out: NamedSharding | None) -> Any:
    """The jitted reduction; layers of one shape share its compiled program."""
    return jax.jit(_sums, out_shardings=out)


def _host_words(array: np.ndarray) -> np.ndarray:
    """`array` as unsigned words, taken on the host: jax would narrow 64-bit numbers."""
    if array.dtype.hasobject or array.dtype.kind in "SU":
        raise TypeError(f"a leaf of type {array.dtype} has no fingerprint; expected numbers")
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.itemsize > 4:
        return array[..., None].view(np.uint32)
    words = array.view(f"u{array.dtype.itemsize}")
    bits = jax.dtypes.itemsize_bits(array.dtype)
    return words if bits >= 8 else words & np.uint8(2**bits - 1)  # numpy keeps a 4-bit number in a byte


def _sums(array: jax.Array) -> jax.Array:
    words = _words(array)
    index = _row_major_index(words.shape)
    odd = 2 * index + jnp.uint32(1)
    lanes = odd * words, _mix(words ^ _mix(index + jnp.uint32(1)))
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in lanes])


def _words(array: jax.Array) -> jax.Array:
    """`array` as 32-bit words; a trailing axis holds the words of elements wider than 32 bits."""
    if jnp.iscomplexobj(array):
        return jnp.stack([_words(array.real), _words(array.imag)], axis=array.ndim)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(array.dtype)
    unsigned = jnp.uint32 if bits >= 32 else jnp.dtype(f"uint{bits}")
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _row_major_index(shape: tuple[int, ...]) -> jax.Array:
    """The flat index of every element, modulo 2³²."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of the 32-bit words in which every bit depends on every other.

    MurmurHash3's finaliser, `fmix32` (Austin Appleby, public domain).
    """
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _hexadecimal(pair: np.ndarray) -> str:
    return f"{int(pair[0]):08x}{int(pair[1]):08x}"
