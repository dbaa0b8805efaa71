"""What cannot be read or written is refused in one line that names it; needs no peers."""

import json

import pytest

from modicum import InputError
from modicum.research.delta import OFT, Adapter, BitFit, DoRA, Full, LoRA, Prefix, SoftPrompt, VeRA
from modicum.research.delta.peft import load_peft, save_peft

from .test_files import VOCAB, WIDTH, base, draw, lora_files, made, write

pytestmark = pytest.mark.usefixtures("quick_compile")

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama():
    return base("llama")


@pytest.fixture(scope="module")
def gpt2():
    return base("gpt2")


def refused(folder, pretrained, *words, **options):
    with pytest.raises(InputError) as caught:
        load_peft(folder, pretrained, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.fixture
def adapter(tmp_path):
    """A LoRA that could be read."""
    return write(tmp_path / "adapter", {"r": 2}, lora_files(NAME, WIDTH, WIDTH, 2))


def test_files_that_are_absent_or_damaged(adapter, llama, tmp_path):
    tensors, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    data = tensors.read_bytes()
    load_peft(adapter, llama)
    refused(tmp_path / "nowhere", llama, "adapter_config.json: no such file")
    tensors.write_bytes(data[:-8])
    refused(adapter, llama, "adapter_model.safetensors", "damaged or incomplete")
    tensors.write_bytes(data[:4])
    refused(adapter, llama, "adapter_model.safetensors", "damaged or incomplete")
    tensors.unlink()
    refused(adapter, llama, "adapter_model.safetensors: no such file")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02")
    refused(adapter, llama, "adapter_model.bin is a pickle", "safetensors.torch.save_file")
    for text, words in (("{", "not valid JSON"), ("[]", "no 'peft_type'"), ('{"r": 8}', "no 'peft_type'")):
        config.write_text(text)
        refused(adapter, llama, "adapter_config.json", words)


VARIANTS = {
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [5],
    "target_parameters": ["experts.up"],
    "use_bdlora": {"blocks": 2},
    "arrow_config": {"router": 1},
    "bias": "lora_only",
    "megatron_config": {"a": 1},
    "some_key_of_the_future": 3,
}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_refused_by_name(adapter, llama, key):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, key: VARIANTS[key]}))
    refused(adapter, llama, f"{key}={VARIANTS[key]!r}", "not supported")
    if key == "some_key_of_the_future":
        load_peft(adapter, llama, ignore=[key])


VALUES = {
    "kind": ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; valid: LORA, IA3"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "quantised": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    "rank": ({"r": 4}, f"{NAME}.lora_A.weight has shape [2, {WIDTH}]"),
    "type": ({"r": "2"}, "r='2'; a value of type int is valid"),
    "start's type": ({"init_lora_weights": [1]}, "init_lora_weights=[1] changes"),
    "alpha's pattern": ({"alpha_pattern": {"q_proj": "x"}}, "the pattern 'q_proj' gives 'x'"),
    "pattern": ({"rank_pattern": {"(": 2}}, "'(' is no regular expression"),
    "DoRA": ({"use_dora": True}, f"{NAME} has lora_A.weight, lora_B.weight but no lora_magnitude_vector"),
}


@pytest.mark.parametrize("changes,words", VALUES.values(), ids=VALUES)
def test_values_that_do_not_fit(adapter, llama, changes, words):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    refused(adapter, llama, words)


PLACES = {
    "another model": ("transformer.h.0.attn.c_attn", "LlamaForCausalLM has no place for"),
    "no module": ("", "LlamaForCausalLM has no place for: lora_A.weight"),
    "a layer too many": ("model.layers.7.self_attn.q_proj", "model.layers.7.self_attn.q_proj.lora_A.weight"),
}


@pytest.mark.parametrize("name,words", PLACES.values(), ids=PLACES)
def test_tensors_without_a_place(tmp_path, llama, name, words):
    tensors = lora_files(name, WIDTH, WIDTH, 2)
    tensors = {key.replace("..", "."): tensor for key, tensor in tensors.items()}
    refused(write(tmp_path / "a", {"r": 2}, tensors), llama, words)


def test_tensors_that_do_not_belong(tmp_path, llama, gpt2):
    good, prefix = lora_files(NAME, WIDTH, WIDTH, 2), "base_model.model."
    embedding = {f"{prefix}model.embed_tokens.lora_embedding_A": draw(2, VOCAB)}
    refused(write(tmp_path / "a", {"r": 2}, {**good, **embedding}), llama, "lora_embedding_A")
    half = {name: x for name, x in good.items() if "lora_A" in name}
    refused(write(tmp_path / "b", {"r": 2}, half), llama, "has lora_A.weight but no lora_B.weight")
    resized = {f"{prefix}lm_head.weight": draw(VOCAB + 3, WIDTH)}
    refused(write(tmp_path / "c", {"r": 2}, {**good, **resized}), llama, f"has shape [{VOCAB + 3}, {WIDTH}]")
    fused = lora_files("transformer.h.0.attn.c_attn", WIDTH, 3 * WIDTH, 2)
    config = {"r": 2, "init_lora_weights": "pissa"}
    refused(write(tmp_path / "d", config, fused), gpt2, "pissa of a fused matrix has no form in its parts")
    tied = {f"{prefix}transformer.wte.weight": draw(VOCAB, WIDTH)}
    refused(write(tmp_path / "e", {"r": 2}, {**fused, **tied}), gpt2, "is tied to another tensor")
    magnitude = {f"{prefix}{NAME}.lora_magnitude_vector": draw(WIDTH)}
    refused(write(tmp_path / "f", {"r": 2}, {**good, **magnitude}), llama, "no use_dora")


def test_other_kinds_that_do_not_fit(tmp_path, llama):
    prompt = {"prompt_embeddings": draw(3, WIDTH)}
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    refused(write(tmp_path / "a", config, prompt), llama, f"of shape [3, {WIDTH}]", f"make it [4, {WIDTH}]")
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    refused(write(tmp_path / "b", config, prompt), llama, "prompt_embeddings is of shape")
    vera = {f"base_model.model.{NAME}.vera_lambda_{end}": draw(n) for end, n in (("b", WIDTH), ("d", 4))}
    refused(write(tmp_path / "c", {"peft_type": "VERA", "r": 4}, vera), llama, "save_projection=True")
    turned = {f"base_model.model.{NAME}.oft_R.weight": draw(2, 6)}
    for changes, words in (
        ({"peft_version": "0.17.1"}, "of PEFT 0.17.1 is another series"),
        ({"peft_version": "0.21.2", "coft": True}, "coft=True"),
        ({"peft_version": "0.21.2", "num_cayley_neumann_terms": 3}, "num_cayley_neumann_terms=3"),
    ):
        config = {"peft_type": "OFT", "oft_block_size": 4, **changes}
        refused(write(tmp_path / "d", config, turned), llama, words)
    factors = {f"base_model.model.{NAME}.ia3_l": draw(1, WIDTH)}
    refused(write(tmp_path / "e", {"peft_type": "IA3"}, factors), llama, "ia3_l has shape")
    for names, words in (("(", "'(' is no regular expression"), (1, "1 names no modules")):
        config = {"peft_type": "IA3", "feedforward_modules": names}
        refused(write(tmp_path / "e", config, factors), llama, words)


def test_projections_of_too_few_axes(tmp_path, llama):
    prefix = f"base_model.model.{NAME}"
    vera = {f"{prefix}.vera_lambda_d": draw(4), f"{prefix}.vera_lambda_b": draw(WIDTH)}
    shared = {"base_model.vera_A": draw(4), "base_model.vera_B": draw(WIDTH, 4)}
    refused(write(tmp_path / "a", {"peft_type": "VERA", "r": 4}, vera | shared), llama, "vera_A [4]")


SPECS = {
    "no such method": ({"mlp/up": Adapter()}, "PEFT has no adapter; valid: lora, dora, ia3"),
    "two kinds": ({"mlp/up": LoRA(2), "mlp/down": OFT(4)}, "of one kind, this delta of LORA, OFT"),
    "two at one": ({"mlp/up": [LoRA(2), LoRA(2)]}, "layers_0/mlp/up: two deltas at one module"),
    "LoRA and DoRA": ({"mlp/up": LoRA(2), "mlp/down": DoRA(2)}, "one of LoRA and DoRA"),
    "two dropouts": ({"mlp/up": VeRA(2), "mlp/down": VeRA(2, 0.5)}, "one dropout in a VeRA adapter"),
    "two sizes": ({"mlp/up": OFT(4), "mlp/down": OFT(2)}, "one block size"),
    "only whole arrays": ({"final_norm": Full()}, "needs a delta at a module"),
    "a whole array there": (
        {"mlp/up": LoRA(2), "layers_1/mlp/up/kernel": Full()},
        "up_proj: a delta and arrays",
    ),
    "prefix and LoRA": ({"attention": Prefix(2), "mlp/up": LoRA(2)}, "of one kind"),
}


@pytest.mark.parametrize("spec,words", SPECS.values(), ids=SPECS)
def test_deltas_that_peft_cannot_have(tmp_path, llama, spec, words):
    tuned, variables = made(llama, spec)
    with pytest.raises(InputError, match=words) as caught:
        save_peft(tmp_path / "new", tuned, variables, llama)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_arrays_that_are_tied(tmp_path, gpt2):
    tuned, variables = made(gpt2, {"mlp/up": LoRA(2), "embedding": Full()})
    with pytest.raises(InputError, match="weight is tied to another tensor"):
        save_peft(tmp_path, tuned, variables, gpt2)


def test_biases_are_saved_with_their_modules(tmp_path, gpt2):
    tuned, variables = made(gpt2, {"mlp/up": LoRA(2), "attention": BitFit()})
    save_peft(tmp_path, tuned, variables, gpt2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"][:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_a_prompt_beside_another_delta(tmp_path, llama):
    tuned, variables = made(llama, {"": SoftPrompt(2), "mlp/up": LoRA(2)})
    with pytest.raises(InputError, match="a PEFT adapter is of one kind"):
        save_peft(tmp_path, tuned, variables, llama)
