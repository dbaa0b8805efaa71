"""VeRA and OFT from PEFT, to PEFT, and trained on both sides."""

import pytest

from modicum import InputError
from modicum.research.delta import OFT, VeRA
from modicum.research.delta.peft import save_peft

from .oracle import FAMILIES, exchange, made_here, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"], "gpt2": ["c_attn", "c_fc"]}


def options(name):
    return {"target_modules": TARGETS[name], "task_type": FAMILIES[name].task}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_vera(bases, tmp_path, name):
    exchange(bases(name), "VeRA", peft.VeraConfig(r=6, **options(name)), tmp_path)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_oft(bases, tmp_path, name):
    exchange(bases(name), "OFT", peft.OFTConfig(oft_block_size=4, **options(name)), tmp_path)


def test_oft_exact(bases, tmp_path):
    config = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **options("llama"))
    exchange(bases("llama"), "OFT, exact", config, tmp_path)


def test_vera_fused(bases, tmp_path):
    config = peft.VeraConfig(r=6, **options("gpt2"))
    exchange(bases("gpt2"), "VeRA, fused", config, tmp_path, train=False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vera_made_here(bases, tmp_path, name):
    """Matrices of several shapes are side by side, and so are parts of one matrix that differ."""
    case = bases(name)
    tuned, variables = case.made({"attention/(query|value)": VeRA(5), "mlp/down": VeRA(5)})
    config = made_here(case, "VeRA, made here", tuned, variables, tmp_path, again=False)
    assert config["r"] > 5


def test_oft_made_here(bases, tmp_path):
    case = bases("llama")
    tuned, variables = case.made({"attention/(query|value)": OFT(6), "mlp/up": OFT(6)})
    made_here(case, "OFT, made here", tuned, variables, tmp_path)


def test_oft_of_weights_that_peft_cannot_turn(bases, tmp_path):
    case = bases("gpt2")
    tuned, variables = case.made({"attention/output": OFT(6)})
    with pytest.raises(InputError, match="c_proj: PEFT has no OFT for weights"):
        save_peft(tmp_path, tuned, variables, case.pretrained)
