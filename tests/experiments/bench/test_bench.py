"""`modicum bench train` from the command's dataclass to the files it writes."""

import json

import pytest

from modicum import InputError
from modicum.experiments.bench.job import DecoderJob
from modicum.experiments.bench.training import Measurements
from modicum.experiments.bench.training_report import steps_table, utilisation_table
from modicum.experiments.commands.bench import TrainBench

TINY = {"layers": 1, "width": 16, "heads": 2, "length": 8, "batch": 2, "vocab": 32, "rounds": 2}


@pytest.mark.slow
def test_ours_alone_needs_no_peers(capsys, tmp_path):
    assert TrainBench(**TINY, contenders=("ours",), out=tmp_path).run() == 0
    assert "Modicum" in capsys.readouterr().out
    record = json.loads((tmp_path / "train.json").read_text())
    assert len(record["rounds"]["ours"]) == 2
    assert all(one["wall"] > 0 and one["cpu"] > 0 for one in record["rounds"]["ours"])
    assert (tmp_path / "steps.csv").read_text().startswith("train step,tokens/s")


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_contenders_take_part(capsys, tmp_path):
    pytest.importorskip("torch")
    assert TrainBench(**TINY, out=tmp_path).run() == 0
    printed = capsys.readouterr().out
    for name in ("Modicum", "PyTorch eager", "torch.compile", "XLA"):
        assert name in printed
    record = json.loads((tmp_path / "train.json").read_text())
    assert {len(rounds) for rounds in record["rounds"].values()} == {2}
    losses = [rounds[0]["loss"] for rounds in record["rounds"].values()]
    assert max(losses) - min(losses) < 0.5, "random initial models all start near log(vocab)"


def test_the_tables_are_medians_and_ratios_of_rounds():
    job = DecoderJob(layers=1, width=16, heads=2, length=8, batch=2, vocab=32)
    seconds = {"ours": (1.0, 2.0, 8.0), "eager": (3.0, 4.0, 4.0)}
    rounds = {name: [{"wall": s, "cpu": 2 * s, "loss": 3.0} for s in each] for name, each in seconds.items()}
    sizes = {(2048, 2048, 2048), *(sizes for _, sizes in job.products())}
    products = {
        library: {each: {"wall": rate * _flops(each), "cpu": 2 * rate * _flops(each)} for each in sizes}
        for library, rate in (("XLA", 1e-9), ("PyTorch", 2e-9))
    }
    seen = Measurements(job, flops=1e9, rounds=rounds, products=products, load=[0.0, 0.0])
    ours, eager = steps_table(seen).rows
    assert ours == ("Modicum", 16 / 2.0, 2.0, 4.0, 1.0, 1.0)
    assert eager[1:] == (16 / 4.0, 4.0, 8.0, 2.0, 2.0)  # 3/1, 4/2, 4/8
    _, rate, *shares = utilisation_table(seen).rows[0]
    assert rate == 0.5  # 1 GFLOP in 2 s, and XLA multiplies at 1 GFLOP/s, 0.5 by CPU seconds
    assert shares == [50.0, 50.0, 50.0, 50.0]


def _flops(sizes):
    m, k, n = sizes
    return 2 * m * k * n


def test_the_products_are_those_of_the_model_flops():
    """Weights times 6: counted once from the products, once from the model's parameters."""
    from modicum.experiments.bench.ours import decoder_config
    from modicum.models.costs import matrix_weights

    job = DecoderJob()
    flops = sum(count * _flops(sizes) for count, sizes in job.products())
    assert flops == 6 * matrix_weights(decoder_config(job)) * job.tokens


def test_a_job_survives_its_journey():
    job = DecoderJob(layers=3, betas=(0.8, 0.9))
    assert DecoderJob.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"heads": 5}, "width 16 is not a multiple of 5 heads"),
        ({"vocab": 0}, "vocab=0 must be at least 1"),
        ({"contenders": ()}, "contenders=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        TrainBench(**{**TINY, **options}).run()


def test_without_pytorch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'modicum\[peers\]'"):
        TrainBench(**TINY).run()


def test_a_file_in_the_way_of_the_output_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        TrainBench(**TINY, out=tmp_path / "out").run()
