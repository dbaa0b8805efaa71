"""OPT and RoBERTa: the other families' names, and a classifier of two modules."""

import pytest

from .oracle import FAMILIES, exchange, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

OTHERS = {"opt": ("LoRA", "prompt", "prefix"), "roberta": ("LoRA", "prompt")}


@pytest.mark.parametrize("name,kind", [(name, kind) for name in OTHERS for kind in OTHERS[name]])
def test_other_families(bases, tmp_path, name, kind):
    """RoBERTa's classifier is two modules, which PEFT takes as one."""
    task, count = {"task_type": FAMILIES[name].task}, {"num_virtual_tokens": 4}
    targets = {"opt": ["q_proj", "fc1"], "roberta": ["query", "intermediate.dense"]}[name]
    if kind == "LoRA":
        config = peft.LoraConfig(r=4, target_modules=targets, **task)
    else:
        made = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
        config = made(**task, **count)
    exchange(bases(name), kind, config, tmp_path, train=False)
