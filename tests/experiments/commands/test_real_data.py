"""The commands of the README on real data: SST-2 (Socher et al., 2013) as JSONL."""

import pytest

pytestmark = pytest.mark.slow


def test_train_and_tune_on_sst2(modicum, shared_data, tmp_path):
    sst2 = shared_data / "sst2"
    model, out = tmp_path / "lm", tmp_path / "tuned"
    options = ["--vocab", 512, "--length", 32, "--batch", 8, "--steps", 4, "--evaluate-every", 0]
    said = modicum("train", sst2, "--preset", "tiny", "--out", model, *options)
    assert said.code == 0, said.error
    refused = modicum("tune", model, "--data", sst2, "--out", out, "--steps", 4, "lora")
    assert refused.code == 2 and "train.jsonl: row " in refused.error and "--truncate" in refused.error
    options = ["--truncate", "--batch", 8, "--steps", 4, "--learning-rate", 1e-3]
    for column in ("label", "label_text"):
        said = modicum(
            "tune", model, "--data", sst2, "--label-column", column, "--out", out / column, *options, "lora"
        )
        assert said.code == 0, said.error
        assert "test accuracy" in said.out
    delta = out / "label" / "lora-0.001"
    said = modicum("evaluate", model, "--data", sst2, "--delta", delta, "--truncate")
    assert said.code == 0 and said.out.startswith("loss ")
