"""`modicum bench generate` from the command's dataclass to the files it writes."""

import json

import jax
import jax.numpy as jnp
import pytest

from modicum import InputError
from modicum.experiments.bench.checkpoints import weight_bytes
from modicum.experiments.bench.generation import Entrant, Seen
from modicum.experiments.bench.generation_job import GenerationJob
from modicum.experiments.bench.generation_report import rates_table
from modicum.experiments.commands.bench import GenerateBench
from modicum.models import MLP, Learned, Transformer, TransformerConfig, multi_head
from modicum.models.pretrained import save_pretrained

TINY = {"batch": (1, 2), "prompt": 8, "new": 4, "rounds": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = TransformerConfig(
        layers=1, width=16, vocab=50, attention=multi_head(2), mlp=MLP(32, "gelu_tanh"), positions=Learned(16)
    )
    model = Transformer(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    folder = tmp_path_factory.mktemp("bench") / "gpt2"
    return save_pretrained(folder, model, params, architecture="GPT2LMHeadModel")


@pytest.mark.slow
def test_ours_alone_needs_no_peers(checkpoint, capsys, tmp_path):
    assert GenerateBench(str(checkpoint), **TINY, contenders=("ours",), out=tmp_path).run() == 0
    assert "Modicum" in capsys.readouterr().out
    record = json.loads((tmp_path / "generate.json").read_text())
    assert {one["batch"] for one in record["rounds"]} == {1, 2}
    assert all(each["first"] > 0 for one in record["rounds"] for each in one["rounds"])
    assert (tmp_path / "generation.csv").read_text().startswith("batch,generation,prefill tokens/s")


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_generate_the_same_tokens(checkpoint, tmp_path):
    pytest.importorskip("transformers")
    assert GenerateBench(str(checkpoint), **TINY, out=tmp_path).run() == 0
    record = json.loads((tmp_path / "generate.json").read_text())
    assert record["equal"] == {"1": 1.0, "2": 1.0}


def test_rates_are_medians_and_ratios_of_rounds():
    seconds = {"Modicum": (1.0, 2.0, 8.0), "transformers": (3.0, 4.0, 4.0)}
    rounds = {(name, 2): [{"first": 10 * s, "token": s} for s in each] for name, each in seconds.items()}
    job = GenerationJob("folder", 50, prompt=5, new=4)
    entrants = {name: Entrant("ours", job, weights=100) for name in seconds}
    seen = Seen(entrants, rounds=rounds, reads={"Modicum": [150.0, 200.0, 250.0]}, load=[0.0, 0.0])
    ours, theirs = rates_table(seen).rows
    # 100 bytes a token at 150, 200, 250 bytes a second: 66.7, 25 and 5 % of the bound
    assert ours == (2, "Modicum", 2 * 5 / 20.0, 2 / 2.0, 1.0, 1.0, 25.0)
    assert theirs[2:] == (2 * 5 / 40.0, 2 / 4.0, 2.0, 2.0, 12.5)


def test_an_untied_word_table_is_not_read_whole():
    params = {"embedding": {"table": jnp.ones((5, 2))}, "head": {"kernel": jnp.ones((2, 5))}}
    assert weight_bytes(params, tied=True) == 80 and weight_bytes(params, tied=False) == 40


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"batch": ()}, "batches=0 must be at least 1"),
        ({"batch": (0,)}, "batch=0 must be at least 1"),
        ({"new": 9}, "18 exceeds the model's 16 positions"),
    ],
)
def test_what_cannot_be_is_refused(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        GenerateBench(str(checkpoint), **{**TINY, **options}, contenders=("ours",)).run()
