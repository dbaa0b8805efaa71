"""The two files of an adapter as they lie on disk, beside files written by hand; needs no peers."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from modicum.models import (
    MLP,
    GatedMLP,
    GroupedQuery,
    Learned,
    RMSNorm,
    Rotary,
    Transformer,
    TransformerConfig,
    unstack_layers,
)
from modicum.models.pretrained import Pretrained
from modicum.research.delta import IA3, DoRA, Full, LoRA, Prefix, ShiftPositions, SoftPrompt, attach
from modicum.research.delta.peft import load_peft, save_peft

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDTH, LAYERS, VOCAB = 8, 3, 20
TOKENS = np.array([[1, 5, 7, 2]])


def base(family="gpt2", scan=False, bare=False, seed=0):
    """A tiny model with random parameters, as `load_pretrained` would return it."""
    options = {
        "gpt2": {"attention": GroupedQuery(2), "mlp": MLP(12, "gelu_tanh"), "positions": Learned(16)},
        "llama": {
            "attention": GroupedQuery(4, 2, bias=False),
            "mlp": GatedMLP(12, bias=False),
            "norm": RMSNorm(),
            "positions": Rotary(),
            "tied": False,
        },
    }
    config = TransformerConfig(layers=LAYERS, width=WIDTH, vocab=VOCAB, scan=scan, **options[family])
    model = Transformer(config, None) if bare else Transformer(config)
    params = jax.jit(model.init)(jax.random.key(seed), TOKENS)
    names = {"gpt2": ("GPT2LMHeadModel", "GPT2Model"), "llama": ("LlamaForCausalLM", "LlamaModel")}
    name = names[family][bare]
    return Pretrained(model, params, name, {"model_type": family, "architectures": [name]}, Path("base"))


@pytest.fixture(scope="module")
def bases():
    made = {}
    return lambda *key: made.setdefault(key, base(*key))


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def read(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def lora_files(name, inputs, outputs, rank, seed=0):
    prefix = f"base_model.model.{name}"
    return {
        f"{prefix}.lora_A.weight": draw(rank, inputs, seed=seed),
        f"{prefix}.lora_B.weight": draw(outputs, rank, seed=seed),
    }


def made(pretrained, spec, seed=5):
    """(tuned, variables) with random values."""
    tuned = attach(pretrained.model, spec)
    variables = tuned.init(jax.random.key(0), pretrained.params, TOKENS)
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return tuned, {"delta": jax.tree.unflatten(structure, moved), "delta_state": variables["delta_state"]}


def test_lora_is_read_with_its_patterns(bases, tmp_path):
    pretrained = bases("llama")
    q, o = "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.o_proj"
    tensors = {**lora_files(q, WIDTH, WIDTH, 4), **lora_files(o, WIDTH, WIDTH, 2, seed=1)}
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.2\..*": 3}}
    config |= {"use_rslora": True, "target_modules": ["q_proj"], "lora_dropout": 0.25}
    tuned, variables = load_peft(write(tmp_path, config, tensors), pretrained)
    assert {entry.address.text: entry.method for entry in tuned.entries} == {
        "layers_{1}/attention/query": LoRA(4, 6.0, 0.25, rank_stabilised=True),
        "layers_{2}/attention/output": LoRA(2, 3.0, 0.25, rank_stabilised=True),
    }
    assert variables["delta_state"]["layers_1"]["attention"]["query"]["~lora"]["seed"].dtype == jnp.uint32
    merged = tuned.merge(pretrained.params, variables)
    for path, name, scale in (("query", q, 6 / 4**0.5), ("output", o, 3 / 2**0.5)):
        layer = "layers_1" if path == "query" else "layers_2"
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        kernel = np.asarray(pretrained.params[layer]["attention"][path]["kernel"])
        expected = kernel + scale * (b @ a).T
        np.testing.assert_allclose(merged[layer]["attention"][path]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_a_fused_matrix_is_split(bases, tmp_path):
    pretrained = bases("gpt2")
    name = "transformer.h.0.attn.c_attn"
    tensors = lora_files(name, WIDTH, 3 * WIDTH, 4)
    folder = write(tmp_path, {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}, tensors)
    tuned, variables = load_peft(folder, pretrained)
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    for index, part in enumerate(("query", "key", "value")):
        found = variables["delta"]["layers_0"]["attention"][part]["~lora"]
        assert (found["a"] == a.T).all() and (found["b"] == b[index * WIDTH : (index + 1) * WIDTH].T).all()
    assert [entry.address.text for entry in tuned.entries] == ["layers_{0}/attention/(query|key|value)"]


def test_a_lora_is_written(bases, tmp_path):
    """The whole of both files."""
    pretrained = bases("llama")
    tuned, variables = made(pretrained, {"layers_{0,2}/attention/key": LoRA(2, 4.0), "mlp/up": LoRA(3, 4.0)})
    folder = save_peft(tmp_path / "new" / "adapter", tuned, variables, pretrained, base="hub/name")
    config, tensors = read(folder)
    keys = [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 2)]
    ups = [f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)]
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": "hub/name",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 4.0,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 3,
        "rank_pattern": dict.fromkeys(keys, 2),
        "target_modules": sorted(keys + ups),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert isinstance(config["lora_alpha"], int)
    shapes = {f"{name}.lora_A.weight": (2, WIDTH) for name in keys}
    shapes |= {f"{name}.lora_B.weight": (2 * (WIDTH // 4), 2) for name in keys}
    shapes |= {f"{name}.lora_A.weight": (3, WIDTH) for name in ups}
    shapes |= {f"{name}.lora_B.weight": (12, 3) for name in ups}
    assert {name: x.shape for name, x in tensors.items()} == {
        f"base_model.model.{n}": s for n, s in shapes.items()
    }
    own = variables["delta"]["layers_2"]["attention"]["key"]["~lora"]
    assert (tensors[f"base_model.model.{keys[1]}.lora_A.weight"] == np.asarray(own["a"]).T).all()
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_separate_products_are_blocks_of_a_fused_matrix(bases, tmp_path):
    pretrained = bases("gpt2")
    tuned, variables = made(pretrained, {"layers_1/attention/(query|value)": LoRA(2, 4.0)})
    config, tensors = read(save_peft(tmp_path, tuned, variables, pretrained))
    b = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    assert config["r"] == 4 and config["lora_alpha"] == 8.0 and config["fan_in_fan_out"]
    blocks = b.reshape(3, WIDTH, 2, 2).any((1, 3))
    assert blocks.tolist() == [[True, False], [False, False], [False, True]]


OTHERS = {
    "DoRA": ({"layers_0/attention/(query|key)": DoRA(2)}, "LORA", {"lora_magnitude_vector": (3 * WIDTH,)}),
    "IA3": ({"layers_0/attention/(query|key)": IA3()}, "IA3", {"ia3_l": (3 * WIDTH, 1)}),
    "IA3 of inputs": ({"layers_0/mlp/down": IA3("input")}, "IA3", {"ia3_l": (1, 12)}),
    "prefix": (
        {"attention": Prefix(3), "": ShiftPositions(3)},
        "PREFIX_TUNING",
        {"prompt_embeddings": (3, 2 * LAYERS * WIDTH)},
    ),
    "prompt": ({"": SoftPrompt(3)}, "PROMPT_TUNING", {"prompt_embeddings": (3, WIDTH)}),
}


@pytest.mark.parametrize("spec,kind,shapes", OTHERS.values(), ids=OTHERS)
def test_other_kinds_are_written_and_read(bases, tmp_path, spec, kind, shapes):
    pretrained = bases("gpt2")
    tuned, variables = made(pretrained, spec)
    config, tensors = read(save_peft(tmp_path, tuned, variables, pretrained))
    assert config["peft_type"] == kind
    for end, shape in shapes.items():
        assert [x.shape for name, x in tensors.items() if name.endswith(end)] == [shape]
    again, found = load_peft(tmp_path, pretrained)
    apply = [
        jax.jit(each.apply)(v, pretrained.params, TOKENS) for each, v in ((tuned, variables), (again, found))
    ]
    np.testing.assert_allclose(*apply, rtol=1e-6, atol=1e-6)


def test_scanned_layers_are_the_same_adapter(bases, tmp_path):
    """Rows of a stack, some of them, to the same file and back."""
    scanned = bases("gpt2", True)
    plain = replace(bases("gpt2"), params=unstack_layers(scanned.params))
    spec = {"layers_{0,2}/attention/(query|key|value)": LoRA(2, 4.0), "layers_{1-}/mlp/down": LoRA(2, 4.0)}
    tuned, variables = made(scanned, spec)
    save_peft(tmp_path / "scanned", tuned, variables, scanned)
    again, found = load_peft(tmp_path / "scanned", plain)
    expected = jax.jit(tuned.apply)(variables, scanned.params, TOKENS)
    np.testing.assert_allclose(
        jax.jit(again.apply)(found, plain.params, TOKENS), expected, rtol=1e-5, atol=1e-6
    )
    save_peft(tmp_path / "plain", again, found, plain)
    restacked, back = load_peft(tmp_path / "plain", scanned)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "scanned" / name).read_bytes()
    np.testing.assert_array_equal(jax.jit(restacked.apply)(back, scanned.params, TOKENS), expected)


def test_prefixes_and_norms_of_scanned_layers(bases, tmp_path):
    """One layer's norm, trained in full, is a row of a stack here."""
    scanned = bases("llama", True)
    spec = {"attention": Prefix(2), "": ShiftPositions(2), "layers_{1}/mlp_norm": Full()}
    tuned, variables = made(scanned, spec)
    _, tensors = read(save_peft(tmp_path, tuned, variables, scanned))
    assert [name for name in tensors if "norm" in name] == [
        f"base_model.model.layers.{layer}.post_attention_layernorm.weight" for layer in range(LAYERS)
    ]
    again, found = load_peft(tmp_path, scanned)
    expected = jax.jit(tuned.apply)(variables, scanned.params, TOKENS)
    np.testing.assert_array_equal(jax.jit(again.apply)(found, scanned.params, TOKENS), expected)


def test_names_of_models_without_a_head(bases, tmp_path):
    """An adapter of the one fits the other, and each is written with its own names."""
    headed, bare = bases("gpt2"), bases("gpt2", False, True)
    tuned, variables = made(headed, {"mlp/up": LoRA(2)})
    save_peft(tmp_path / "headed", tuned, variables, headed)
    again, found = load_peft(tmp_path / "headed", bare)
    save_peft(tmp_path / "bare", again, found, bare)
    _, tensors = read(tmp_path / "bare")
    assert all(name.startswith("base_model.model.h.") for name in tensors)
    _, back = load_peft(tmp_path / "bare", headed)
    jax.tree.map(np.testing.assert_array_equal, back["delta"], variables["delta"])


def test_the_dtype_of_an_adapter_stays(bases, tmp_path):
    pretrained = bases("llama")
    tensors = lora_files("model.layers.1.mlp.down_proj", 12, WIDTH, 2)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    folder = write(tmp_path / "theirs", {"r": 2, "target_modules": ["down_proj"]}, tensors)
    tuned, variables = load_peft(folder, pretrained)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["delta"])} == {jnp.dtype("bfloat16")}
    _, found = read(save_peft(tmp_path / "ours", tuned, variables, pretrained))
    assert {name: x.tobytes() for name, x in found.items()} == {
        name: x.tobytes() for name, x in tensors.items()
    }


def test_an_adapter_that_is_there_is_replaced(bases, tmp_path):
    pretrained = bases("llama")
    for rank in (2, 3):
        tuned, variables = made(pretrained, {"attention/query": LoRA(rank)})
        save_peft(tmp_path, tuned, variables, pretrained)
    assert load_peft(tmp_path, pretrained)[0].entries[0].method.rank == 3
