"""The fingerprint sees every change of content and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modicum.research.training.fingerprint import combined, fingerprint, leaf_paths

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint16", "bool", "float8_e4m3fn", "complex64"]


def one(leaf: object) -> str:
    return fingerprint({"leaf": leaf})["leaf"]


def values(dtype: str, shape: tuple[int, ...] = (6, 8)) -> np.ndarray:
    numbers = np.random.default_rng(0).normal(size=shape) * 4
    return np.asarray(jnp.asarray(numbers).astype(dtype))


def reference(array: np.ndarray) -> str:
    """The definition in the module's docstring, in Python integers."""

    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    raw = array.tobytes()
    size = min(array.dtype.itemsize, 4)
    words = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
    a = sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**32
    b = sum(mix(word ^ mix(i + 1)) for i, word in enumerate(words)) % 2**32
    return f"{a:08x}{b:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_definition_on_device_and_host(dtype: str) -> None:
    array = values(dtype)
    assert one(array) == one(jnp.asarray(array)) == reference(array)


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_wide_elements_are_two_words(dtype: str, x64: None) -> None:
    array = values(dtype)
    assert array.dtype == dtype
    assert one(array) == one(jnp.asarray(array)) == reference(array)


def test_host_doubles_are_not_narrowed_without_x64() -> None:
    array = np.random.default_rng(0).normal(size=(3, 5))
    changed = array.copy()
    changed.view(np.uint64)[1, 2] ^= 1  # far below float32's precision
    assert one(array) == reference(array)
    assert one(array) != one(changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_flipped_bit_is_seen(dtype: str) -> None:
    array = values(dtype, (3, 4))
    before, seen = one(array), set()
    for byte in range(array.nbytes):
        for bit in range(8):
            changed = array.copy()
            changed.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            seen.add(one(changed))
    assert before not in seen
    assert len(seen) == 8 * array.nbytes  # and each gives another fingerprint


def test_swapped_elements_are_seen_however_round_their_bits() -> None:
    array = np.zeros(70_000, np.float32)
    array[0] = 1.0
    found = set()
    for distance in [1, 2, 256, 512, 1024, 4096, 65536]:
        changed = np.zeros_like(array)
        changed[distance] = 1.0
        found.add(one(changed))
    assert one(array) not in found and len(found) == 7


def test_negative_zero_and_nan_payloads_count() -> None:
    quiet = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert one(np.float32(0.0)) != one(np.float32(-0.0))
    assert one(jnp.asarray(quiet[:1])) != one(jnp.asarray(quiet[1:]))


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 4), (1, 8)])
def test_does_not_depend_on_the_mesh(shape: tuple[int, ...]) -> None:
    names = ("data", "tensor")[: len(shape)]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), names)
    for dtype in ["float32", "bfloat16", "int32"]:
        array = values(dtype, (16, 24))
        for spec in [PartitionSpec(*names), PartitionSpec(None, names), PartitionSpec(names[0])]:
            assert one(jax.device_put(array, NamedSharding(mesh, spec))) == one(array)


def test_typed_keys_scalars_and_empty_leaves() -> None:
    key = jax.random.key(7)
    assert one(key) == one(jax.random.key_data(key)) != one(jax.random.key(8))
    assert one(3) == one(np.int64(3)) != one(4)
    assert one(jnp.float32(3)) == one(np.float32(3))
    assert one(jnp.zeros((0, 3))) == "0" * 16
    assert fingerprint({}) == {}


def test_text_has_no_fingerprint() -> None:
    with pytest.raises(TypeError, match="no fingerprint"):
        fingerprint({"name": "text"})


def test_paths_and_the_combined_digest() -> None:
    tree = {"layers": [{"kernel": jnp.ones((2, 2))}, {"kernel": jnp.zeros(3)}], "scale": 1.0}
    assert set(leaf_paths(tree)) == {"layers/0/kernel", "layers/1/kernel", "scale"}
    assert combined(tree) == combined(fingerprint(tree))
    assert len(combined(tree)) == 16
    assert combined(tree) != combined({**tree, "scale": 2.0})
    assert combined({"a": jnp.ones(2)}) != combined({"b": jnp.ones(2)})


def test_inside_an_x64_block_and_outside_the_same() -> None:
    array = values("float32")
    outside = one(jnp.asarray(array))
    with jax.enable_x64(True):
        assert one(jnp.asarray(array)) == outside
