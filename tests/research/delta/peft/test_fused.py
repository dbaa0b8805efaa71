"""LoRA and DoRA in GPT-2's `c_attn`, which is queries, keys and values: split, joined and stacked."""

import pytest

from modicum.research.delta import DoRA, LoRA

from .oracle import exchange, made_here, peft

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]


@pytest.mark.parametrize("weighted", [False, True], ids=["LoRA", "DoRA"])
def test_fused(bases, tmp_path, weighted):
    """A is copied and B split, so what comes back is the file that was."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], use_dora=weighted, task_type="CAUSAL_LM"
    )
    kind = "DoRA" if weighted else "LoRA"
    exchange(bases("gpt2"), f"{kind}, fused", config, tmp_path, train=False)


FUSED = {
    "query and value": ({"attention/(query|value)": LoRA(4, 8.0)}, 8),
    "all three": ({"attention/(query|key|value)": LoRA(4, 8.0)}, 12),
    "three ranks, one scale": (
        {
            f"attention/{name}": LoRA(rank, 3.0 * rank)
            for name, rank in (("query", 2), ("key", 3), ("value", 4))
        },
        9,
    ),
    "two scales": ({"attention/query": LoRA(4, 8.0), "attention/value": LoRA(4, 4.0)}, 8),
    "rank-stabilised": ({"attention/(query|value)": LoRA(4, 7.0, rank_stabilised=True)}, 8),
    "DoRA": ({"attention/(query|value)": DoRA(4, 8.0)}, 8),
}


@pytest.mark.parametrize("spec,rank", FUSED.values(), ids=FUSED)
def test_separate_deltas_are_stacked_in_a_fused_matrix(bases, tmp_path, spec, rank):
    case = bases("gpt2")
    tuned, variables = case.made(spec)
    config = made_here(case, "LoRA, stacked", tuned, variables, tmp_path, again="attention/query" not in spec)
    assert config["r"] == rank
