"""LoRA and its variants, from PEFT, to PEFT, and trained on both sides."""

import pytest

from modicum import InputError
from modicum.research.delta import LoRA
from modicum.research.delta.peft import load_peft

from .oracle import FAMILIES, MAIN, exchange, made_here, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

# Where one matrix of theirs is one of ours: trained further, A has no copies that could part ways.
TARGETS = {
    "gpt2": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "v", "wo"],
}


def lora(name, **options):
    task = FAMILIES[name].task
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[name], "task_type": task, **options}
    )


@pytest.mark.parametrize("name", MAIN)
def test_lora(bases, tmp_path, name):
    exchange(bases(name), "LoRA", lora(name), tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_dora(bases, tmp_path, name):
    exchange(bases(name), "DoRA", lora(name, use_dora=True), tmp_path)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rank_stabilised(bases, tmp_path, name):
    exchange(bases(name), "rsLoRA", lora(name, use_rslora=True), tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_patterns_and_some_layers(bases, tmp_path, name):
    config = lora(
        name,
        rank_pattern={"v_proj": 3, "layer.0.SelfAttention.v": 3},
        alpha_pattern={"down_proj": 5, "wo": 2.5},
        layers_to_transform=None if name == "t5" else [1],
    )
    tuned, _ = exchange(bases(name), "LoRA with patterns", config, tmp_path, train=False)
    assert {entry.method.rank for entry in tuned.entries} == {3, 4}


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_starts_from_the_weights(bases, tmp_path, name, start):
    """What is written has twice the rank: the start is part of it."""
    config = lora(name, init_lora_weights=start)
    exchange(bases(name), start, config, tmp_path, exact=False)


@pytest.mark.parametrize("name", MAIN)
def test_made_here(bases, tmp_path, name):
    case = bases(name)
    spec = {"mlp/down": LoRA(3, 5.0), "attention/output": LoRA(2, 4.0)}
    tuned, variables = case.made(spec)
    config = made_here(case, "LoRA, made here", tuned, variables, tmp_path)
    assert all(name.count(".") >= 3 for name in config["target_modules"])


def test_a_start_from_the_weights_made_here(bases, tmp_path):
    case = bases("llama")
    tuned, variables = case.made({"attention/query": LoRA(3, 6.0, initialisation="pissa")})
    config = made_here(case, "PiSSA, made here", tuned, variables, tmp_path, again=False)
    assert (config["r"], config["lora_alpha"]) == (6, 12.0)


def test_the_logits(bases, tmp_path):
    """PEFT stores the weights of the logits beside their delta; they are the base model's."""
    config = lora("llama", target_modules=["lm_head"])
    exchange(bases("llama"), "LoRA of the logits", config, tmp_path, train=False, exact=False)


def test_poolers_are_no_products(bases, tmp_path):
    case = bases("bert")
    case.wrapped(lora("bert", target_modules=["dense"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"at bert.pooler.dense, whose product is inside our classifier"):
        load_peft(tmp_path, case.pretrained)
