"""What the compiler's schedules say and the table made of it; compiling is the `tpu_aot` tier's."""

import pytest

from modicum.experiments.bench.attention_biases import BIASES, Biased, biases_table
from modicum.experiments.bench.attention_bounds import Bound, bundles, document


def test_bundles_are_read_by_the_name_of_the_kernel(tmp_path):
    text = "Schedule analysis:\n\ttotal scheduled bundles:    5347\n\tempty scheduled bundles:    21\n"
    name = "1795365726550885710-jvp_attention_forward_.1-00-schedule-analysis_final_bundles.txt"
    (tmp_path / name).write_text(text)
    (tmp_path / "17-jvp_attention_forward_.1-01-final_bundles.txt").write_text("0x1 : {}")
    assert bundles(tmp_path) == {"jvp_attention_forward_": 5347}


def test_the_bound_is_one_bundle_a_cycle_and_at_most_the_peak():
    bound = Bound("v5e", 128, "forward", 5000, 4000)
    assert bound.rate(8192) == pytest.approx(2 * 2 * 1024 * 1024 * 128 / 8192 * 1.5e9 / 1e12)
    assert bound.rate(1000) == 197
    assert Bound("v5p", 128, "forward", 1, 1).rate(16384) == pytest.approx(114.7, rel=1e-3)


def test_a_row_says_who_is_ahead():
    page = document([Bound("v6e", 64, "dq", 4000, 5000)])
    assert "| v6e | 64 | dq | 4000 | 5000 | 176 | 141 | 1.25 |" in page


def test_a_bias_stands_beside_none():
    counts = [Biased("v5e", "forward", bias, count) for bias, count in zip(BIASES, (1000, 1500, 9000))]
    page = document([Bound("v6e", 64, "dq", 4000, 5000)], list(biases_table(counts)))
    assert page.endswith("|---|---|---|---|---|\n| v5e | forward | 1000 | 1500 (1.5×) | 9000 (9.0×) |\n")


def test_one_kernel_stands_beside_the_two_that_it_replaces():
    counts = {"dq": 4000, "dk, dv": 6000, "dq, dk, dv": 7000}
    page = document([Bound("v6e", 64, kernel, count, 5000) for kernel, count in counts.items()])
    assert page.endswith("| v6e | 64 | 7000 | 10000 | 0.70 |\n")
