import dataclasses
import json

import numpy as np
import pytest

from modicum import InputError
from modicum.models.kernels import (
    Causal,
    Dense,
    Full,
    Keys,
    Lengths,
    Prefix,
    Request,
    Segments,
    Window,
    block_sizes,
)
from modicum.models.kernels.block_sizes import (
    FIELDS,
    TABLE,
    mask_kind,
    read,
    width_bucket,
    with_entry,
    written,
)
from modicum.models.kernels.tpu import block_sizes as tpu_blocks
from modicum.models.kernels.tpu.plan import common_length, fitting_block

IDS, ANYTHING = np.ones((1, 4), int), dict.fromkeys(FIELDS, "*")


@pytest.fixture
def table(monkeypatch):
    def use(*entries):
        whole = tuple({"implementation": "x", **ANYTHING, **entry} for entry in entries)
        monkeypatch.setattr(block_sizes, "entries", lambda: whole)

    return use


def find(length=512, **found):
    fields = {"chip": "cpu", "dtype": "float32", "width": 64, "mask": "causal", **found}
    return block_sizes.block_sizes("x", length=length, **fields)


def test_the_entry_that_names_most_is_taken(table):
    table(
        {"length": 512, "blocks": [1, 1]},
        {"length": 512, "blocks": [2, 2], "chip": "cpu"},
        {"length": 512, "blocks": [3, 3], "chip": "cpu", "mask": "causal"},
    )
    assert find() == (3, 3) and find(mask="full") == (2, 2) and find(chip="H200") == (1, 1)
    assert block_sizes.block_sizes("y", length=1, chip="cpu", dtype="float32", width=64, mask="full") is None


def test_lengths_go_to_the_next_longer_entry_and_beyond_the_last(table):
    table({"length": 2048, "blocks": [2, 2]}, {"length": 512, "blocks": [1, 1]})
    assert [find(length) for length in (1, 512, 513, 2048, 10**6)] == [(1, 1), (1, 1), (2, 2), (2, 2), (2, 2)]


def test_tpu_kernels_take_the_entry_of_their_own_and_else_constants(table):
    request = Request("tpu", 1, 4096, 4096, 2, 2, 128, 128, "bfloat16", Causal(), None, False)
    table({"length": 512, "blocks": [1, 1]})
    default = (1024, 1024, 512)
    assert [tpu_blocks.blocks_for(kernel, request) for kernel in tpu_blocks.KERNELS] == [default] * 4
    table({"implementation": "tpu backward", "length": 1024, "blocks": [512, 2048, 256], "width": 128})
    assert tpu_blocks.blocks_for("backward", request) == (512, 2048, 256)
    assert tpu_blocks.blocks_for("forward", request) == default
    assert tpu_blocks.blocks_for("backward", dataclasses.replace(request, width=256)) == default


def test_kernels_with_different_blocks_have_one_length_that_all_cut_well():
    assert common_length(8192, (1024, 2048), 128) == 8192
    assert common_length(1664, (1024, 2048), 128) == 1792  # 1664 is 13 registers: no block of 1024 has more
    for length in range(1024, 20000, 128):
        padded = common_length(length, (1024, 2048), 128)
        assert length <= padded < 1.13 * length
        assert all(fitting_block(padded, block, 128) > 0.4 * block for block in (1024, 2048))


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (Full(), "full"),
        (Lengths(3), "full"),
        (Causal(), "causal"),
        (Prefix(np.array([1])), "causal"),
        (Causal() & Lengths(3), "causal"),
        (Window(3, 0), "window"),
        (Causal() & Window(3, None), "window"),
        (Causal() & Segments(IDS), "packed"),
        (Window(3, 0) & Segments(IDS), "packed"),
        (Causal() | Keys(IDS > 0), "other"),
        (Dense(np.ones((1, 1, 4, 4), bool)), "other"),
        (~Causal(), "other"),
    ],
    ids=str,
)
def test_a_mask_has_a_kind(mask, kind):
    assert mask_kind(mask) == kind


def test_widths_share_buckets():
    assert [width_bucket(width) for width in (8, 32, 33, 64, 80, 128, 129, 576)] == [
        32,
        32,
        64,
        64,
        128,
        128,
        256,
        576,
    ]


def test_the_table_of_the_package_is_one():
    assert {"chunked"} <= {entry["implementation"] for entry in read(TABLE)}
    assert json.loads(written(read(TABLE))) == read(TABLE)
    for entry in read(TABLE):
        if entry["implementation"].startswith("tpu"):
            assert entry["by"] in ("bundles", "time") and tuple(entry["blocks"]) in tpu_blocks.CANDIDATES


def test_an_entry_replaces_the_one_for_the_same():
    old = {"implementation": "x", **ANYTHING, "length": 512, "blocks": [1, 1]}
    table = with_entry([old], {**old, "blocks": [2, 2]})
    assert [entry["blocks"] for entry in table] == [[2, 2]]
    assert len(with_entry(table, {**old, "chip": "cpu"})) == 2


@pytest.mark.parametrize(
    ("text", "why"), [("{", "no table"), ('[{"length": 3}]', "an entry lacks a field"), ("[3]", "no table")]
)
def test_a_file_that_is_no_table_is_named(tmp_path, text, why):
    path = tmp_path / "sizes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read(path)
