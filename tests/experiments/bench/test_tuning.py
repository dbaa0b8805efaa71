"""`modicum bench tune`: both sides train the same numbers, and its tables are what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.experiments.bench.training import Measurements, Memory
from modicum.experiments.bench.tuning import _examples, full_rows, greatest_gap, measure_tuning, tuning_job
from modicum.experiments.bench.tuning_job import TuningJob
from modicum.experiments.bench.tuning_report import losses_table, memory_table
from modicum.experiments.commands.bench import TuneBench
from modicum.models import MLP, LayerNorm, Learned, PostNorm, Transformer, TransformerConfig, multi_head
from modicum.models.heads import Pooler
from modicum.models.pretrained import save_pretrained
from modicum.models.pretrained.minilm import PACKAGE

SIZES = {"layers": 2, "width": 16, "heads": 2, "hidden": 32, "batch": 2, "length": 8, "rank": 2}
METHODS = ("lora", "bitfit", "full")
RATES = {"lora": 0.03, "bitfit": 0.03, "full": 0.001}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A BERT of two small layers, and eight rows."""
    folder = tmp_path_factory.mktemp("tuning")
    config = TransformerConfig(
        kind="encoder",
        layers=2,
        width=16,
        vocab=50,
        attention=multi_head(2),
        mlp=MLP(32, "gelu"),
        norm=LayerNorm(1e-12),
        positions=Learned(8),
        residual=PostNorm(),
        embedding_norm=True,
        token_types=2,
        initial_std=0.3,
    )
    model = Transformer(config, Pooler())
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    checkpoint = save_pretrained(folder / "bert", model, params, architecture="BertModel")
    rng = np.random.default_rng(0)
    np.savez(folder / "rows.npz", tokens=rng.integers(0, 50, (8, 8)), labels=np.arange(8) % 2)
    return str(checkpoint), str(folder / "rows.npz")


@pytest.mark.peers
@pytest.mark.parametrize("method", METHODS)
def test_both_sides_have_the_same_losses(files, method):
    pytest.importorskip("peft")
    from modicum.experiments.bench.tuning_ours import OurTuning
    from modicum.experiments.bench.tuning_torch import TorchTuning

    job = TuningJob(*files, **SIZES, method=method, learning_rate=RATES[method])
    ours, theirs = OurTuning(job), TorchTuning(job, compiled=False)
    losses = np.asarray([(ours.run(1), theirs.run(1)) for _ in range(6)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=2e-4)
    assert abs(losses[4:] - losses[:2]).min() > 1e-3, "the same rows again: training has changed something"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained(files, method):
    from modicum.experiments.bench.tuning_ours import OurTuning

    trained = jax.tree.leaves(OurTuning(TuningJob(*files, **SIZES, method=method)).state.trainable)
    head, biases = 16 * 2 + 2, 2 * (4 * 16 + 32 + 16 + 2 * 16) + 16 + 16
    body = 50 * 16 + 8 * 16 + 2 * 16 + 2 * (4 * 256 + 2 * 512 + 2 * 16) + 16 + 256
    expected = {"lora": 2 * 2 * 2 * 16 * 2 + head, "bitfit": biases + head, "full": body + biases + head}
    assert sum(leaf.size for leaf in trained) == expected[method]


@pytest.mark.slow
def test_ours_alone_in_its_process(files, tmp_path):
    job = TuningJob(*files, **SIZES)
    seen = measure_tuning(job, rounds=2, steps=1, contenders=("ours-tuning",), report=lambda line: None)
    from modicum.experiments.bench.tuning_report import summary, write

    write(seen, tmp_path)
    record = json.loads((tmp_path / "tune.json").read_text())
    assert len(record["rounds"]["ours-tuning"]) == 2 and len(record["losses"]["ours-tuning"]) == 3
    memory = record["memory"]["ours-tuning"]
    assert 0 < memory["loaded"] < memory["stepping"] <= memory["starting"] * 1.5
    assert "LoRA of rank 2 on query and value, 2 layers" in summary(seen)


def test_flops_are_those_of_the_products():
    sizes = {"layers": 3, "width": 8, "heads": 2, "hidden": 32, "batch": 2, "length": 4}
    rows, weights, attention = 8, 3 * (4 * 64 + 2 * 256), 12 * 3 * 8 * 4 * 8
    full = TuningJob("", "", **sizes, method="full").flops
    assert full == 6 * rows * weights + attention
    assert TuningJob("", "", **sizes, method="bitfit").flops == 4 * rows * weights + attention
    lora = TuningJob("", "", **sizes, rank=2).flops
    thin = (6 * 6 - 2) * 2 * rows * 8 * 2  # six a site; the input's gradient is not needed in the first layer
    assert lora == 4 * rows * weights - 2 * 3 * rows * 64 + attention + thin


def test_tables():
    memory = Memory(loaded=100 << 20, starting=300 << 20, stepping=250 << 20)
    seen = Measurements(
        TuningJob("", "", 1, 8, 2, 8),
        flops=1.0,
        memory={"ours-tuning": memory},
        losses={"ours-tuning": [0.5, 0.25], "peft": [0.5, 0.5]},
    )
    assert memory_table(seen).rows == (("Modicum", 100, 300, 250, 150),)
    assert greatest_gap(seen) == 0.25
    assert losses_table(seen).rows[1] == ("PyTorch + PEFT", "0.500000", "0.500000")


def test_rows_are_whole_texts_and_full(tmp_path):
    pytest.importorskip(PACKAGE)
    from modicum.models.pretrained.minilm import minilm_folder

    data = tmp_path / "data.jsonl"
    examples = [{"text": f"a film of {i}", "label": int(i % 6 == 5)} for i in range(16)]
    data.write_text("\n".join(map(json.dumps, examples)))
    tokens, labels = full_rows(data, minilm_folder(), 3, 12)
    assert tokens.shape == (3, 12) and (tokens[:, 0] == 101).all() and (tokens[:, -1] == 102).all()
    assert labels.tolist() == [0, 1, 0]  # three texts a row; the last one's
    with pytest.raises(InputError, match=r"fills 5 rows of 12 tokens; 9 are needed"):
        full_rows(data, minilm_folder(), 9, 12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 17}, "rank=17 exceeds the width 16"),
        ({"heads": 3}, "width 16 is not a multiple of 3 heads"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"method": "magic"}, "method 'magic' is unknown; valid: lora, bitfit, full"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        TuningJob("", "", **{**SIZES, **change})


def test_data_and_checkpoints_that_do_not_fit(tmp_path):
    data, folder = tmp_path / "data.jsonl", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    sizes = {"method": "lora", "batch": 1, "length": 8, "rank": 1, "checkpoint": folder}
    with pytest.raises(InputError, match=r"holds model_type='gpt2'"), tuning_job(data, **sizes):
        pass
    data.write_text("{broken")
    with pytest.raises(InputError, match=r"data.jsonl: line 1 is not JSON"):
        list(_examples(data))
    data.write_text('{"text": "fine", "label": 2}')
    with pytest.raises(InputError, match=r"row 1 has label 2; 0 and 1 are valid"):
        list(_examples(data))


def test_without_peft_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'modicum\[peers\]'"):
        TuneBench(tmp_path / "none.jsonl").run()
