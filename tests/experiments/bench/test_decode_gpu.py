"""The benchmark of decoding on GPUs, as far as a machine without one can run it."""

import json

import pytest

from modicum.experiments.bench import decode_gpu
from modicum.experiments.bench.decode_gpu import Decoding, table_of


def test_each_case_is_a_row_with_a_time_and_a_rate(monkeypatch, tmp_path):
    case = Decoding(2, 32, heads=4, kv_heads=2, width=8)
    assert case.size == 2 * 2 * 32 * 2 * 8 * 2  # keys and values, rows, keys, heads, width, bytes
    found = table_of((case,), ("gathered",), rounds=1, calls=1)
    assert found.columns[-2:] == ("gathered µs", "gathered GB/s")
    micro, rate = found.rows[0][-2:]
    assert micro > 0 and rate == pytest.approx(case.size / micro / 1e3, abs=0.06)  # bytes a µs
    monkeypatch.setattr(decode_gpu, "table_of", lambda rounds: found)
    decode_gpu.main(tmp_path / "decode")
    assert json.loads((tmp_path / "decode" / "decode.json").read_text())[0]["batch"] == 2
    assert (tmp_path / "decode" / "decode.md").read_text() == found.markdown()
