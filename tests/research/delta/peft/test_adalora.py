"""AdaLoRA from PEFT, to PEFT, and trained on both sides with its penalty."""

import pytest

from modicum.research.delta import AdaLoRA

from .oracle import FAMILIES, exchange, made_here, peft, torch

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"], "gpt2": ["c_attn", "c_fc"]}


def adalora(name, **options):
    task = FAMILIES[name].task
    return peft.AdaLoraConfig(
        init_r=4, lora_alpha=8, total_step=10, target_modules=TARGETS[name], task_type=task, **options
    )


def orthogonality(model):
    """As PEFT adds it to the loss that the model itself computes (`AdaLoraModel.forward`)."""
    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram))))
    return 0.5 * sum(terms) / len(terms)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adalora(bases, tmp_path, name):
    exchange(bases(name), "AdaLoRA", adalora(name), tmp_path, penalty=orthogonality)


def test_fused(bases, tmp_path):
    exchange(bases("gpt2"), "AdaLoRA, fused", adalora("gpt2"), tmp_path, train=False)


def test_ranks_that_were_taken_away(bases, tmp_path):
    """A pattern of ranks, as an adapter has it after training."""
    kept = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]}
    kept["model.layers.1.mlp.down_proj.lora_E"] = [False, True, True, True]
    config = adalora("llama")
    case = bases("llama")
    model = case.wrapped(config)
    model.peft_config["default"].rank_pattern = kept
    model.base_model.resize_modules_by_rank_pattern(kept, "default")
    exchange(case, "AdaLoRA of ranks", model, tmp_path, train=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_made_here(bases, tmp_path, name):
    """In GPT-2 ranks of queries and values add up, and every module's are said to be as many."""
    case = bases(name)
    tuned, variables = case.made({"attention/(query|value)": AdaLoRA(3, 5.0), "mlp/down": AdaLoRA(2, 8.0)})
    made_here(case, "AdaLoRA, made here", tuned, variables, tmp_path, again=False)
