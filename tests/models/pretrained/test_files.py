"""Folders of safetensors: what is read, and one line for whatever is wrong with them."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from modicum import InputError
from modicum.models.pretrained.container import Tensor, read_header, write_file
from modicum.models.pretrained.files import TensorFiles, locate

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "scalar": np.array(3.5, np.float16),
    "counts": np.arange(5),
    "nothing": np.zeros((0, 4), np.float32),
}


def write(folder, tensors=TENSORS, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    write_file(path, [Tensor(n, v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()])
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return path


def refused(folder):
    with pytest.raises(InputError) as error:
        TensorFiles.open(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(tmp_path):
    write(tmp_path)
    files = TensorFiles.open(tmp_path)
    assert set(files.names) == set(TENSORS) and files.settings == {"model_type": "gpt2"}
    for name, values in TENSORS.items():
        assert files.shape(name) == values.shape and files.dtype(name) == values.dtype
        assert files.read(name).tobytes() == values.tobytes()
    part = files.read("matrix", (slice(1, 3), slice(0, 2)))
    assert part.tolist() == [[4, 5], [8, 9]] and not part.flags.owndata and not part.flags.writeable


def test_the_safetensors_library_reads_our_files_and_we_its(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = write(tmp_path)
    assert all(np.array_equal(numpy.load_file(path)[name], TENSORS[name]) for name in ("matrix", "counts"))
    numpy.save_file({"matrix": TENSORS["matrix"]}, path, metadata={"format": "pt"})
    assert np.array_equal(TensorFiles.open(tmp_path).read("matrix"), TENSORS["matrix"])


def test_the_metadata_says_pytorch_as_transformers_wants_it(tmp_path):
    with write(tmp_path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert length % 8 == 0
        assert json.loads(file.read(length))["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200, -1])
def test_truncated_files(tmp_path, keep):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged or incomplete" in refused(tmp_path)


def with_header(path, change):
    """The file again, with a changed header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(data[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"{nonsense", "not that of a safetensors file"),
        (lambda text: b"[1, 2]", "not that of a safetensors file"),
        (lambda text: b"[" * 100_000, "not that of a safetensors file"),
        (lambda text: text.replace(b"[0,48]", b"[-48,0]"), "tensor 'matrix' lies at bytes"),
        (lambda text: b'{"a": {"dtype": "F32"}}', "not that of a safetensors file"),
        (lambda text: text.replace(b"[3,4]", b"[3,5]"), r"'matrix' of shape [3, 5] has 48 bytes"),
        (lambda text: text.replace(b"[0,48]", b"[0,99999]"), "tensor 'matrix' lies at bytes"),
    ],
)
def test_damaged_headers(tmp_path, change, message):
    with_header(write(tmp_path), change)
    found = refused(tmp_path)
    assert "model.safetensors is damaged or incomplete" in found and message in found


def test_a_header_longer_than_the_format_allows(tmp_path):
    path = write(tmp_path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    assert "header ends beyond" in refused(tmp_path)


def test_any_other_byte_in_the_header(tmp_path):
    """Whatever stands there, the file is read or refused in one line."""
    path = write(tmp_path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    numbers = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        spoiled = bytearray(data)
        for place in numbers.integers(0, 8 + length, 2):
            spoiled[place] = numbers.integers(32, 127) if place >= 8 else numbers.integers(0, 256)
        path.write_bytes(spoiled)
        try:
            files = TensorFiles.open(tmp_path)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
            continue
        for name in files.names:
            try:
                files.read(name).tobytes()
            except InputError:
                outcomes.add("type")
    assert {"read", "refused"} <= outcomes


def test_types_that_numpy_does_not_know(tmp_path):
    with_header(write(tmp_path), lambda text: text.replace(b'"I64"', b'"F8_E4M3"'))
    files = TensorFiles.open(tmp_path)
    with pytest.raises(InputError, match="'counts' has type F8_E4M3, which cannot be read; valid: F64, F32"):
        files.dtype("counts")


def sharded(folder, **changes):
    for number, names in enumerate((("matrix", "half"), ("scalar", "counts"))):
        write(folder, {name: TENSORS[name] for name in names}, f"part-{number}.safetensors")
    places = {"matrix": 0, "half": 0, "scalar": 1, "counts": 1}
    weight_map = {name: f"part-{number}.safetensors" for name, number in places.items()}
    index = {"metadata": {}, "weight_map": {**weight_map, **changes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_with_an_index(tmp_path):
    files = TensorFiles.open(sharded(tmp_path))
    assert set(files.names) == {"matrix", "half", "scalar", "counts"}
    assert np.array_equal(files.read("counts"), TENSORS["counts"])


def test_missing_shards_and_tensors_of_an_index(tmp_path):
    assert "lacks part-7.safetensors, which model" in refused(sharded(tmp_path, half="part-7.safetensors"))
    assert "do not hold ghost, which it names" in refused(sharded(tmp_path, ghost="part-0.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"matrix": "part-0.safetensors"}}')
    assert "does not name half, which the files hold" in refused(tmp_path)
    for text, message in (("{}", "no weight_map"), ("{", "not JSON"), ("[]", "not a JSON object")):
        index.write_text(text)
        assert message in refused(tmp_path)


def test_folders_without_what_is_needed(tmp_path):
    assert "is not a folder" in refused(tmp_path / "absent")
    write(tmp_path)
    assert "is not a folder" in refused(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_how_to_convert(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    assert "has neither model.safetensors nor" in refused(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refused(tmp_path)
    assert f"holds {name}: pickles may run any code" in message
    assert "AutoModel.from_pretrained(OLD).save_pretrained(NEW)" in message


def test_safetensors_under_other_names_are_named(tmp_path):
    write(tmp_path, name="model.fp16.safetensors")
    assert "it holds model.fp16.safetensors" in refused(tmp_path)


def test_local_folders_come_before_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert locate("gpt2").resolve() == (tmp_path / "gpt2").resolve()
    assert locate("./nowhere/at/all") == type(tmp_path)("nowhere/at/all")
    with pytest.raises(InputError, match=r"revision=.v1\.0. is of a name on the hub; gpt2 is a local"):
        locate("gpt2", "v1.0")


def test_a_name_of_the_hub_without_a_network(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"'nobody/nothing' is no local folder and the Hugging Face"
    ) as error:
        locate("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_name_of_the_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        locate("nobody/nothing")


def test_what_is_fetched_from_the_hub(monkeypatch, tmp_path):
    """Never pickles, nor weights of other forms beside ours."""
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **given: asked.update(given) or str(tmp_path))
    assert locate("some/model") == tmp_path and asked["revision"] is None
    assert locate("some/model", "v1.0") == tmp_path and asked["revision"] == "v1.0"
    from fnmatch import fnmatch

    def taken(name):
        return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    assert all(map(taken, ("config.json", "model.safetensors", "model-00001-of-00002.safetensors")))
    assert all(map(taken, ("tokenizer.json", "vocab.txt", "merges.txt", "spiece.model")))
    assert not any(map(taken, ("pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx")))


def test_a_header_is_read_without_the_data(tmp_path):
    path = write(tmp_path)
    assert read_header(path)["matrix"].shape == (3, 4)
