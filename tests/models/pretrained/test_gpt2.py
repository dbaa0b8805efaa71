"""GPT-2 against `transformers`: logits, hidden states, gradients, and out again."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modicum import InputError
from modicum.models.pretrained import load_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TINY = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4}
TINY |= {"bos_token_id": 1, "eos_token_id": 2}
CONFIGURATIONS = {
    "plain": {},
    "untied, other mlp": {"tie_word_embeddings": False, "n_inner": 56, "activation_function": "relu"},
    "unscaled": {"scale_attn_weights": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "divided by layer": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    "unscaled, divided, upcast": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "attn_implementation": "eager",
    },
}


def gpt2(oracle, kind="GPT2LMHeadModel", seed=0, **options):
    transformers, torch = oracle.transformers, oracle.torch
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**{**TINY, "initializer_range": 0.2, **options})
    return oracle.perturbed(getattr(transformers, kind)(config))


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_parity(oracle, tmp_path, options):
    oracle.compare(tmp_path, gpt2(oracle, **options), {"input_ids": oracle.tokens(97)})


def test_parity_of_the_headless_model_with_padding(oracle, tmp_path):
    ids = oracle.tokens(97)
    mask = (np.arange(12) < np.array([[12], [7]])).astype(np.int64)
    oracle.compare(tmp_path, gpt2(oracle, "GPT2Model"), {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("options", [{}, CONFIGURATIONS["divided by layer"]], ids=["plain", "pattern"])
def test_scanned_and_padded_models_compute_the_same(oracle, tmp_path, options):
    model, inputs = gpt2(oracle, **options), {"input_ids": oracle.tokens(97)}
    model.save_pretrained(tmp_path / "theirs")
    pretrained = load_pretrained(tmp_path / "theirs", scan=True, vocab_multiple=16)
    expected = oracle.theirs(model, inputs)[0]
    logits = np.asarray(pretrained.model.apply(pretrained.params, inputs["input_ids"]))
    assert logits.shape == (2, 12, 112) and (logits[..., 97:] < -1e8).all()
    assert np.abs(logits[..., :97] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert pretrained.params["embedding"]["table"].shape == (112, 32)
    assert (np.asarray(pretrained.params["embedding"]["table"])[97:] == 0).all()
    oracle.save_pretrained(
        tmp_path / "back", pretrained.model, pretrained.params, settings=pretrained.settings
    )
    before, after = (oracle.TensorFiles.open(tmp_path / name) for name in ("theirs", "back"))
    assert set(before.names) - set(after.names) <= {"lm_head.weight"}
    for name in after.names:
        assert before.read(name).tobytes() == after.read(name).tobytes()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_the_language_model_loss(oracle, tmp_path, tied):
    worst = oracle.compare_gradients(tmp_path, gpt2(oracle, tie_word_embeddings=tied), oracle.tokens(97))
    print(f"gradients, tied={tied}: largest difference {worst:.1e} of a tensor's largest gradient")
    assert worst <= 1e-4


@pytest.mark.parametrize("option", ["unscaled", "divided by layer"])
def test_these_options_matter(oracle, option):
    """Parity could not be had without reading them."""
    ids, options = oracle.tokens(97), dict(CONFIGURATIONS[option])
    activation = {"activation_function": options.pop("activation_function")}
    one, two = (
        oracle.theirs(gpt2(oracle, **given, **activation), {"input_ids": ids})[0] for given in ({}, options)
    )
    assert np.abs(one - two).max() > 100 * oracle.TOLERANCE * np.abs(one).max()


def test_files_without_the_prefix_and_with_buffers(oracle, tmp_path):
    """The hub's GPT-2: names of the headless model, a causal mask in every layer."""
    model = gpt2(oracle)
    model.save_pretrained(tmp_path / "theirs")
    tensors = {name: p.detach() for name, p in model.transformer.named_parameters()}
    tensors |= {f"h.{i}.attn.bias": oracle.torch.ones(1, 1, 40, 40) for i in range(3)}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    pretrained = load_pretrained(tmp_path / "theirs")
    inputs = {"input_ids": oracle.tokens(97)}
    expected = oracle.theirs(model, inputs)[0]
    assert np.abs(pretrained.model.apply(pretrained.params, inputs["input_ids"]) - expected).max() < 1e-5
    assert pretrained.left_out == () and pretrained.initialised == ()


def test_a_tied_copy_must_be_equal(oracle, tmp_path):
    from safetensors.torch import save_file

    model = gpt2(oracle)
    model.save_pretrained(tmp_path)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    copy = tensors["transformer.wte.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, tmp_path / "model.safetensors")
    assert flatten_dict(load_pretrained(tmp_path).params)
    copy[3, 3] += 1
    save_file({**tensors, "lm_head.weight": copy}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight differs from transformer.wte.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, r"add_cross_attention=True \(valid: False\)"),
        ({"activation_function": "mish"}, r"activation_function='mish' \(valid: gelu_new, "),
        ({"rope_theta": 3.0, "n_hyper": 1}, r"rope_theta=3.0 \(unknown.*; n_hyper=1 \(unknown"),
        ({"n_layer": "3"}, r"n_layer='3'; a value of type int is valid"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"not supported; valid: GPT2LMHeadModel, GPT2Model"),
    ],
)
def test_options_that_cannot_be_had(oracle, tmp_path, changes, message):
    gpt2(oracle).save_pretrained(tmp_path)
    oracle.change_settings(tmp_path, changes)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_shards_of_either_side_are_read_by_the_other(oracle, tmp_path):
    model, inputs = gpt2(oracle), {"input_ids": oracle.tokens(97)}
    expected = oracle.theirs(model, inputs)[0]
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    loaded = load_pretrained(tmp_path / "theirs")
    oracle.save_pretrained(
        tmp_path / "ours", loaded.model, loaded.params, settings=loaded.settings, max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert (oracle.oracle_on(tmp_path / "ours", model, inputs) == expected).all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_files_of_the_oracle(oracle, tmp_path, kind):
    """Read as they are and as float32, and the oracle reads ours with the type that they have."""
    torch = oracle.torch
    model = gpt2(oracle).to(getattr(torch, kind))
    model.save_pretrained(tmp_path / "theirs")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach()
    for dtype in ("float32", kind):
        loaded = load_pretrained(tmp_path / "theirs", dtype=dtype)
        ours = loaded.params["layers_0"]["mlp"]["up"]["kernel"]
        assert ours.dtype == dtype and np.array_equal(np.asarray(ours, np.float32), weight.float().numpy())
        oracle.save_pretrained(tmp_path / dtype, loaded.model, loaded.params, settings=loaded.settings)
        again = type(model).from_pretrained(tmp_path / dtype)
        assert again.dtype == getattr(torch, dtype)
        assert torch.equal(again.transformer.h[0].mlp.c_fc.weight.float(), weight.float())
