"""`modicum plan`: what it prints, and every wrong input in one line with exit code 2."""

import re

import pytest


@pytest.fixture(scope="module")
def gpt3(modicum):
    """The plan of the issue that asked for it."""
    said = modicum(
        *("plan", "gpt3-175b", "--chip", "v5p", "--topology", "4x4x4", "--batch", 1536, "--seq", 2048),
        *("--tokens", "3e11", "--price", 2.5),
    )
    assert said.code == 0
    return said.out


def figure(pattern, text):
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1].replace(",", ""))


def test_gpt3_on_64_v5p(gpt3):
    for kind in ("parameters", "gradients", "optimizer", "activations", "temporaries"):
        assert re.search(rf"\| {kind} +\| +[\d.]+ \|", gpt3)
    for kind in ("compute", "memory traffic", "communication that cannot hide", "step"):
        assert re.search(rf"\| {kind} +\| +[\d.]+ \|", gpt3)
    assert figure(r"total \(of 95.0\) +\| +([\d.]+) \|", gpt3) < 95 * 0.95
    assert "runner-up: " in gpt3


def test_its_days_and_dollars_follow_from_its_rate(gpt3):
    rate, days = figure(r"([\d,]+) tokens/s", gpt3), figure(r"tokens: ([\d,.]+) days", gpt3)
    assert days == pytest.approx(3e11 / rate / 86_400, rel=0.001)
    hours, dollars = figure(r"([\d,]+) chip-hours", gpt3), figure(r"\$([\d,]+) at \$2.5", gpt3)
    assert dollars == pytest.approx(2.5 * hours, rel=1e-4)


def test_the_smallest_slice(modicum):
    said = modicum("plan", "gpt2-xl", "--chip", "v5e", "--topology", "4x4", "--batch", 8, "--smallest")
    assert said.code == 0 and "v5e (2 chips)" in said.out


def test_serving_rises_with_the_batch_until_it_does_not_fit(modicum):
    said = modicum(
        *("plan", "gpt3-175b", "--chip", "a100-80", "--topology", 8, "--seq", 1000, "--serve"),
        *("--serve-batch", 1, 48, 128),
    )
    rows = [row.split("|")[1:-1] for row in said.out.splitlines() if re.match(r"\| +\d", row)]
    rates = [float(row[3].replace(",", "")) for row in rows]
    assert rates == sorted(rates) and rates[1] == pytest.approx(1358, rel=0.01)
    assert [row[-1].strip() for row in rows] == ["yes", "yes", "no"]


def test_a_remembered_figure_is_said_to_be(modicum):
    options = ("plan", "gpt2", "--topology", 8, "--batch", 64, "--seq", 512)
    assert "network is remembered" in modicum(*options, "--chip", "v100").out
    assert "remembered" not in modicum(*options, "--chip", "v5p").out
    assert "network is remembered" in modicum(*options, "--chip", "v100", "--serve").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chip", "v9"), "chip 'v9' is unknown"),
        (("--topology", "4x4x4x4"), "joined in 3 dimensions"),
        (("--topology", "big"), "topology 'big' is no shape"),
        (("--batch", 0), "batch=0 must be at least 1"),
        (("--batch", 7), "data x fsdp can be 1 (batch=7); tensor can be 1, 2, 4 (heads of layer 0=12)"),
        (
            ("--axes", "pipe", "--batch", 4, "--topology", "2x2x3"),
            "mesh pipe=12 has 4 rows a replica; pipe=12 needs at least 12 micro-batches",
        ),
        (("--mesh", "fsdp=3", "--smallest"), "mesh fsdp=3 has 3 devices; the slices of v5p that"),
        (("--batch", 7, "--axes", "data"), "data x fsdp = 64 does not divide batch=7"),
        (("--axes", "tensor"), "tensor=64 does not divide heads"),
        (("--mesh", "fsdp=3"), "mesh fsdp=3 needs 3 devices, topology 4x4x4 has 64"),
        (("--efficiency", 2), "efficiency=2.0 must be above 0 and at most 1"),
        (("--serve", "--efficiency", 0), "efficiency=0.0 must be above 0"),
        (("--serve", "--smallest"), "--serve and --smallest are different questions"),
        (("--tokens", -1), "must not be negative"),
        (("--tokens", "nan"), "tokens=nan must be finite"),
        (("--tokens", "inf"), "tokens=inf must be finite"),
        (("--price", "nan"), "price=nan must be finite"),
        (("--seq", 2048), "sequence length 2048 exceeds the model's 1024 positions"),
        (("--serve", "--serve-batch", 0), "serve_batch=0 must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(refused, options, message):
    assert message in refused("plan", "gpt2", *options)


def test_an_impossible_budget_says_the_smallest_that_would_do(refused):
    said = refused("plan", "gpt3-175b", "--chip", "v5e", "--topology", "4x4", "--batch", 256)
    assert re.search(r"does not fit 4x4 v5e: the smallest plan needs [\d.]+ GiB a device, 14.2 GiB are", said)
    assert "the smallest slice that would do is 16x16 (256 chips)" in said


def test_a_host_that_is_too_small_is_named(refused):
    said = refused("plan", "gpt3-175b", "--chip", "a100-80", "--topology", 16, "--offload")
    assert re.search(r"offloaded, a device .*needs [\d.]+ GiB of its host's, 64.0 GiB are taken", said)
    assert "needs 61.5 GiB a device, 75.4 GiB are there" not in said


def test_only_decoders_are_served(refused):
    assert "this model is an encoder-decoder" in refused("plan", "transformer-base", "--serve")
    assert "transformer-base is an encoder-decoder" in refused("plan", "transformer-base")


def test_an_unknown_preset(refused):
    assert "preset 'gpt9' is unknown" in refused("plan", "gpt9")
