"""Tiles ranked by given counts of bundles; counting them is the `tpu_aot` tier's."""

import dataclasses

import pytest

from modicum import InputError
from modicum.experiments.bench import attention_tpu
from modicum.experiments.bench.attention_tiles import Step, bundles, ranked
from modicum.experiments.commands.bench_attention import AttentionBench
from modicum.models.kernels import Causal, Full, Request, block_sizes
from modicum.models.kernels.tpu.block_sizes import CANDIDATES, blocks_for

SMALL = Step("v5e", "TPU v5 lite", "tpu forward", (1024, 1024, 512), full=100, partial=130)
WIDE = SMALL._replace(tile=(1024, 2048, 512), full=180, partial=200)
REQUEST = Request("tpu", 1, 2048, 2048, 2, 2, 128, 128, "bfloat16", Causal(), None, False)


def test_a_mask_costs_its_tiles_of_each_kind():
    assert bundles(SMALL, "full", 2048) == 4 * 100
    assert bundles(SMALL, "causal", 2048) == 100 + 2 * 130
    assert bundles(SMALL, "causal", 8192) == 28 * 100 + 8 * 130
    assert bundles(WIDE, "causal", 2048) == 2 * 200
    assert bundles(SMALL, "full", 100) == 100  # a tile is no longer than the sequence


def test_kernels_read_the_tiles_of_fewest_bundles(monkeypatch):
    told = []
    other = [step._replace(chip="v6e", kind="TPU v6 lite", full=1) for step in (SMALL, WIDE)]
    table = ranked(
        [SMALL, WIDE, *other], [], width=96, dtype="bfloat16", lengths=(2048, 8192), report=told.append
    )
    assert len(table) == len(told) == 2 * 2 * 2  # chips, masks, lengths
    assert "v5e 96 causal tpu forward at 2048, bundles a head: 1024x1024x512 360, 1024x2048x512 400" in told
    monkeypatch.setattr(block_sizes, "entries", lambda: tuple(table))
    monkeypatch.setattr(block_sizes, "chip", lambda: "TPU v5 lite")
    assert blocks_for("forward", REQUEST) == SMALL.tile  # widths of 96 and 128 share an entry
    assert blocks_for("forward", dataclasses.replace(REQUEST, mask=Full())) == WIDE.tile
    assert blocks_for("backward", dataclasses.replace(REQUEST, mask=Full())) == SMALL.tile  # has no entry


def test_candidates_are_whole_and_no_smaller_than_the_default():
    assert (1024, 1024, 512) in CANDIDATES
    for rows, columns, chunk in CANDIDATES:
        assert rows * columns >= 1 << 20 and columns % chunk == 0 and rows * chunk <= 1 << 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"chips=\('v5e',\) are for --tune"),
        ({"tune": True, "mask": "window"}, "mask=window, bias=none: --chips ranks tiles for full and causal"),
        ({"tune": True}, "--chips compiles for TPUs: libtpu is not installed"),
    ],
)
def test_what_cannot_be_ranked_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(attention_tpu, "missing", lambda: "libtpu is not installed")
    with pytest.raises(InputError, match=message):
        AttentionBench(chips=("v5e",), **options).run()
