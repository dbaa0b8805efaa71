"""IA3 from PEFT, to PEFT, and trained on both sides; modules trained in full beside it."""

import pytest

from modicum import InputError
from modicum.research.delta import IA3, Full, LoRA
from modicum.research.delta.peft import save_peft

from .oracle import FAMILIES, MAIN, exchange, made_here, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TARGETS = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["key", "value", "intermediate.dense"], r".*layer.\d.intermediate.dense"),
    "t5": (["k", "v", "wo"], ["wo"]),
}


@pytest.mark.parametrize("name", MAIN)
def test_ia3(bases, tmp_path, name):
    targets, inputs = TARGETS[name]
    if isinstance(inputs, str):
        targets = r".*\.(key|value)|" + inputs
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, task_type=FAMILIES[name].task)
    exchange(bases(name), "IA3", config, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_made_here(bases, tmp_path, name):
    """In GPT-2 the queries' factors are ones, which is what no factors are."""
    case = bases(name)
    tuned, variables = case.made({"attention/(key|value)": IA3(), "mlp/down": IA3("input")})
    config = made_here(case, "IA3, made here", tuned, variables, tmp_path, again=name != "gpt2")
    assert len(config["target_modules"]) == (4 if name == "gpt2" else 6)
    assert len(config["feedforward_modules"]) == 2


def test_factors_of_a_fused_matrix_have_one_input(bases, tmp_path):
    case = bases("gpt2")
    tuned, variables = case.made({"attention/(query|key|value)": IA3("input")})
    with pytest.raises(InputError, match="c_attn: the factor of its input is one for all of"):
        save_peft(tmp_path, tuned, variables, case.pretrained)


@pytest.mark.parametrize("name,path", [("bert", "classifier"), ("gpt2", "layers_{1}/mlp_norm")])
def test_modules_trained_in_full(bases, tmp_path, name, path):
    case = bases(name)
    full = {
        f"{path}/{leaf}": Full() for leaf in (("kernel", "bias") if name == "bert" else ("scale", "bias"))
    }
    tuned, variables = case.made({"mlp/up": LoRA(3, 5.0), **full})
    config = made_here(case, "LoRA and Full", tuned, variables, tmp_path)
    assert config["modules_to_save"] == ["classifier" if name == "bert" else "transformer.h.1.ln_2"]
