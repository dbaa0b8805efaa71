"""LLaMA, Mistral, Qwen2 and Qwen3 against `transformers`: every option, every layer, and out again."""

import numpy as np
import pytest

from modicum import InputError
from modicum.models import ClassifierHead, GroupedQuery
from modicum.models.pretrained import load_pretrained
from modicum.models.rotary import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compile")]

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN_HEADS = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


CONFIGURATIONS = {
    "Llama grouped": ("Llama", {}),
    "Llama plain heads, tied, biases": (
        "Llama",
        {**PLAIN_HEADS, **TIED, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "Llama wide heads": ("Llama", {"head_dim": 12, "rms_norm_eps": 1e-3, "num_key_value_heads": 1}),
    "Llama linear": ("Llama", rope("linear", factor=2.0)),
    "Llama dynamic": ("Llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 8}),
    "Llama llama3": (
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "Llama yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Llama yarn, all options": (
        "Llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.2,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "Llama yarn, own temperature": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.3),
    ),
    "Mistral window": ("Mistral", {"sliding_window": 4, "num_hidden_layers": 3}),
    "Mistral no window, tied": ("Mistral", {"sliding_window": None, **TIED, **PLAIN_HEADS}),
    "Mistral wide heads": ("Mistral", {"head_dim": 16, "sliding_window": 7, **rope("linear", factor=2.0)}),
    "Qwen2 grouped": ("Qwen2", {}),
    "Qwen2 windows above, tied": (
        "Qwen2",
        {**TIED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "Qwen2 plain heads": (
        "Qwen2",
        {**PLAIN_HEADS, **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "Qwen3 grouped": ("Qwen3", {"head_dim": 12}),
    "Qwen3 biases, tied, plain heads": (
        "Qwen3",
        {**TIED, **PLAIN_HEADS, "head_dim": 8, "attention_bias": True},
    ),
    "Qwen3 alternating windows": (
        "Qwen3",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def model_of(oracle, kind, ending="ForCausalLM", **options):
    transformers = oracle.transformers
    oracle.torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
    return oracle.perturbed(getattr(transformers, f"{kind}{ending}")(config))


@pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_parity(oracle, tmp_path, kind, options):
    oracle.compare(tmp_path, model_of(oracle, kind, **options), {"input_ids": oracle.tokens(97)})


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_parity_of_the_headless_model_with_padding(oracle, tmp_path, kind):
    mask = (np.arange(12) < np.array([[12], [7]])).astype(np.int64)
    inputs = {"input_ids": oracle.tokens(97), "attention_mask": mask}
    oracle.compare(tmp_path, model_of(oracle, kind, "Model", head_dim=8), inputs)


@pytest.mark.parametrize("name", ["Llama wide heads", "Qwen3 biases, tied, plain heads"])
def test_gradients_of_the_language_model_loss(oracle, tmp_path, name):
    kind, options = CONFIGURATIONS[name]
    worst = oracle.compare_gradients(tmp_path, model_of(oracle, kind, **options), oracle.tokens(97))
    print(f"gradients, {name}: largest difference {worst:.1e} of a tensor's largest gradient")
    assert worst <= 1e-4


SPECIAL = {"rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def plain(kind, options):
    """The options without scaled positions and with other windows: none, or some where there were none."""
    kept = {key: value for key, value in options.items() if key not in SPECIAL}
    if kind == "Mistral":
        kept["sliding_window"] = None if options["sliding_window"] else 4
    return {**kept, **rope("default")} if "rope_parameters" in options else kept


@pytest.mark.parametrize(
    "name", [name for name, (_, options) in CONFIGURATIONS.items() if SPECIAL & set(options)]
)
def test_these_options_matter(oracle, name):
    """Parity could not be had without reading them."""
    kind, options = CONFIGURATIONS[name]
    inputs = {"input_ids": oracle.tokens(97)}
    models = (model_of(oracle, kind, **given) for given in (options, plain(kind, options)))
    one, two = (oracle.theirs(model, inputs)[0] for model in models)
    assert np.abs(one - two).max() > 100 * oracle.TOLERANCE * np.abs(one).max()


def test_scanned_layers_with_a_pattern_compute_the_same(oracle, tmp_path):
    kind, options = CONFIGURATIONS["Qwen3 alternating windows"]
    model, inputs = model_of(oracle, kind, **options), {"input_ids": oracle.tokens(97)}
    model.save_pretrained(tmp_path)
    pretrained = load_pretrained(tmp_path, scan=True)
    assert pretrained.params["layers"]["layer_1"]["attention"]["query"]["kernel"].shape == (2, 32, 32)
    logits = np.asarray(pretrained.model.apply(pretrained.params, inputs["input_ids"]))
    expected = oracle.theirs(model, inputs)[0]
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


SCALINGS = {
    "linear": ({"type": "linear", "factor": 2.0}, LinearScaling(2.0)),
    "dynamic": ({"type": "dynamic", "factor": 2.0}, DynamicScaling(2.0, 64)),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        YarnScaling(4.0, original_length=16),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        Llama3Scaling(8.0, original_length=16),
    ),
}


@pytest.mark.parametrize(("scaling", "expected"), SCALINGS.values(), ids=SCALINGS)
def test_rotary_scalings_as_older_files_have_them(oracle, tmp_path, scaling, expected):
    """`rope_theta` and `rope_scaling` beside each other, as transformers 4 wrote them."""
    model = model_of(oracle, "Llama")
    model.save_pretrained(tmp_path)
    older = {"rope_parameters": None, "rope_theta": 700.0, "rope_scaling": scaling}
    oracle.change_settings(tmp_path, older)
    positions = load_pretrained(tmp_path).model.config.positions
    assert positions.base == 700.0 and positions.scaling == expected


def test_older_files_compute_the_same(oracle, tmp_path):
    """What transformers makes of such a file, we make of it."""
    model_of(oracle, "Llama").save_pretrained(tmp_path)
    older = {"rope_parameters": None, "rope_theta": 700.0, "rope_scaling": SCALINGS["yarn"][0]}
    oracle.change_settings(tmp_path, older)
    inputs = {"input_ids": oracle.tokens(97, length=20)}
    model = oracle.transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    pretrained = load_pretrained(tmp_path)
    expected = oracle.theirs(model, inputs)[0]
    logits = np.asarray(pretrained.model.apply(pretrained.params, inputs["input_ids"]))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_another_head_leaves_the_old_one_out(oracle, tmp_path):
    import jax

    model_of(oracle, "Llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"parameters that the file lacks: classifier/"):
        load_pretrained(tmp_path, head=ClassifierHead(3))
    loaded = load_pretrained(tmp_path, head=ClassifierHead(3), rng=jax.random.key(0))
    assert loaded.left_out == ("lm_head.weight",)
    assert sorted(loaded.initialised) == ["classifier/bias", "classifier/kernel"]
    assert loaded.model.apply(loaded.params, oracle.tokens(97)).shape == (2, 3)
    headless = load_pretrained(tmp_path, head=None)
    assert headless.left_out == ("lm_head.weight",) and headless.initialised == ()
    assert headless.model.apply(headless.params, oracle.tokens(97)).shape == (2, 12, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "mish"}, r"hidden_act='mish' \(valid: gelu_new"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"'longrope' \(valid: default, linear, dynamic,"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, r"twist=1 \(unknown key"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"no 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0.5 \(valid: 1.0"),
        ({"num_key_value_heads": 3}, r"4 heads, which 3 kv_heads do not divide"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} \(valid: None\)"),
        ({"sliding_window": 4}, r"sliding_window=4 \(unknown key"),
    ],
)
def test_options_that_cannot_be_had(oracle, tmp_path, changes, message):
    model_of(oracle, "Llama").save_pretrained(tmp_path)
    oracle.change_settings(tmp_path, changes)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_layer_types_that_cannot_be_had(oracle, tmp_path):
    model_of(oracle, "Qwen2").save_pretrained(tmp_path)
    oracle.change_settings(tmp_path, {"layer_types": ["sliding_attention", "full_attention"]})
    with pytest.raises(InputError, match=r"layer_types=\['sliding_.* \(valid: 2 of full_attention\)"):
        load_pretrained(tmp_path)


def test_a_model_that_the_architecture_cannot_express(oracle, tmp_path):
    from dataclasses import replace

    from modicum.models import Transformer
    from modicum.models.pretrained import save_pretrained

    model_of(oracle, "Qwen2").save_pretrained(tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a")
    capped = replace(loaded.model.config, attention=GroupedQuery(4, 2, output_bias=False, soft_cap=3.0))
    with pytest.raises(
        InputError, match=r"Qwen2ForCausalLM cannot express this model: layer_0=.*soft_cap=3.0"
    ):
        save_pretrained(tmp_path / "b", Transformer(capped), loaded.params, settings=loaded.settings)
    with pytest.raises(InputError, match=r"Qwen2Model ends in None, the model in LanguageModelHead"):
        save_pretrained(tmp_path / "b", loaded.model, loaded.params, architecture="Qwen2Model")
    with pytest.raises(InputError, match=r"mlp=GatedMLP cannot be written as this family; it has MLP"):
        save_pretrained(tmp_path / "b", loaded.model, loaded.params, architecture="GPT2LMHeadModel")
    assert not (tmp_path / "b").exists()
