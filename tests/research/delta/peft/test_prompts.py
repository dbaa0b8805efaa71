"""Prefixes and prompts from PEFT, to PEFT, and trained on both sides."""

import pytest

from modicum import InputError
from modicum.research.delta import Prefix, PromptEncoder, ShiftPositions, SoftPrompt
from modicum.research.delta.peft import save_peft

from .oracle import FAMILIES, MAIN, exchange, made_here, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

DECODERS = ["gpt2", "llama"]


@pytest.mark.parametrize("name", DECODERS)
def test_prefix(bases, tmp_path, name):
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=FAMILIES[name].task)
    exchange(bases(name), "prefix", config, tmp_path)


def test_a_prefix_that_an_mlp_made(bases, tmp_path):
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7, task_type="CAUSAL_LM"
    )
    exchange(bases("llama"), "prefix of an MLP", config, tmp_path, train=False)


@pytest.mark.parametrize("width", [0, 6], ids=["plain", "MLP"])
@pytest.mark.parametrize("name", DECODERS)
def test_prefix_made_here(bases, tmp_path, name, width):
    case = bases(name)
    tuned, variables = case.made({"attention": Prefix(4, width), "": ShiftPositions(4)})
    made_here(case, "prefix, made here", tuned, variables, tmp_path, again=not width)


@pytest.mark.parametrize("spec", ["no shift", "one layer", "another length"])
def test_a_prefix_that_peft_cannot_have(bases, tmp_path, spec):
    case = bases("llama")
    specs = {
        "no shift": {"attention": Prefix(4)},
        "one layer": {"layers_0/attention": Prefix(4), "": ShiftPositions(4)},
        "another length": {"attention": Prefix(4), "": ShiftPositions(3)},
    }
    tuned, variables = case.made(specs[spec])
    with pytest.raises(InputError, match="PEFT's prefix is as long in every layer"):
        save_peft(tmp_path, tuned, variables, case.pretrained)


@pytest.mark.parametrize("name", MAIN)
def test_prompt(bases, tmp_path, name):
    """An encoder-decoder's file has rows that PEFT does not use; they are not written again."""
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type=FAMILIES[name].task)
    exchange(bases(name), "prompt", config, tmp_path, exact=name != "t5")


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_prompt_of_an_encoder(bases, tmp_path, name):
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=7, task_type=FAMILIES[name].task
    )
    exchange(bases(name), "P-tuning", config, tmp_path, train=False)


@pytest.mark.parametrize("name", MAIN)
def test_prompt_made_here(bases, tmp_path, name):
    """PEFT wants the classifier of a classifier too, whether it was trained or not."""
    case = bases(name)
    tuned, variables = case.made({"": SoftPrompt(4)})
    config = made_here(case, "prompt, made here", tuned, variables, tmp_path, again=name != "bert")
    assert config.get("modules_to_save") == (["classifier"] if name == "bert" else None)


def test_encoded_prompt_made_here(bases, tmp_path):
    case = bases("llama")
    tuned, variables = case.made({"": PromptEncoder(4)})
    made_here(case, "P-tuning, made here", tuned, variables, tmp_path, again=False)
