"""ChatGLM-6B against its formulas in NumPy, on a random file: no oracle of it is installed."""

import json
from math import sqrt

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modicum import InputError
from modicum.models import Cache, Transformer
from modicum.models.costs import parameter_count
from modicum.models.pretrained import chatglm, load_pretrained, save_pretrained
from modicum.models.pretrained.files import TensorFiles
from modicum.models.pretrained.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L, V, F = 32, 2, 3, 50, 40
BOS, MASK, GMASK = 44, 40, 41
SPECIAL = {"bos": BOS, "mask": MASK, "gmask": GMASK}
SETTINGS = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "vocab_size": V,
    "hidden_size": D,
    "num_layers": L,
    "num_attention_heads": H,
    "inner_hidden_size": F,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 64,
    "bos_token_id": BOS,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
}
# a prompt alone; text after it; a mask inside the prompt
ROWS = [
    [3, 9, 27, 5, GMASK, BOS],
    [7, 8, GMASK, BOS, 11, 12, 13, 14],
    [1, 2, MASK, 3, 4, BOS, 6],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file with random tensors under the published names, the tied copy and the buffers among them."""
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape, mean=0.0, std=0.3):
        tensors[f"transformer.{name}"] = (mean + std * rng.normal(size=shape)).astype(np.float32)

    add("word_embeddings.weight", V, D, std=1.0)
    for i in range(L):
        for part in ("input_layernorm", "post_attention_layernorm"):
            add(f"layers.{i}.{part}.weight", D, mean=1.0)
            add(f"layers.{i}.{part}.bias", D)
        for part, out, width in (
            ("attention.query_key_value", 3 * D, D),
            ("attention.dense", D, D),
            ("mlp.dense_h_to_4h", F, D),
            ("mlp.dense_4h_to_h", D, F),
        ):
            add(f"layers.{i}.{part}.weight", out, width)
            add(f"layers.{i}.{part}.bias", out)
        add(f"layers.{i}.attention.rotary_emb.inv_freq", 4)
    add("final_layernorm.weight", D, mean=1.0)
    add("final_layernorm.bias", D)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    path = tmp_path_factory.mktemp("chatglm")
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture(scope="module")
def pretrained(folder):
    with jax.enable_x64(True):
        return load_pretrained(folder, dtype="float64")


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


def rotate_half(x, position):
    """`x [n, heads, width]` by the published code: frequencies in float16, pairs in the two halves."""
    width = x.shape[-1]
    frequency = (1 / 10_000 ** (np.arange(0, width, 2) / width)).astype(np.float16).astype(float)
    angle = np.concatenate([position[:, None] * frequency] * 2, -1)[:, None]
    turned = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * np.cos(angle) + turned * np.sin(angle)


def attend(x, tensors, layer, positions, masked, scaled=True):
    """One row's attention by the research page, §6.2, the factor l + 1 of layer l included or not."""
    weight, bias = (tensors[f"attention.query_key_value.{kind}"] for kind in ("weight", "bias"))
    query, key, value = np.split((x @ weight.T + bias).reshape(len(x), H, 3 * D // H), 3, -1)
    half = D // H // 2
    query, key = (
        np.concatenate(
            [rotate_half(z[..., :half], positions[0]), rotate_half(z[..., half:], positions[1])], -1
        )
        for z in (query, key)
    )
    factor = layer + 1 if scaled else 1
    query = query / (sqrt(D // H) * factor)
    scores = np.einsum("qhk,shk->hqs", query, key)
    scores = np.where(masked, -np.inf, scores) * factor
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = np.einsum("hqs,shk->qhk", weights, value).reshape(len(x), D)
    return context @ tensors["attention.dense.weight"].T + tensors["attention.dense.bias"]


def forward(folder, ids, scaled=True, early=False):
    """Logits of one row without padding."""
    tensors = {name: x.astype(float) for name, x in load_file(folder / "model.safetensors").items()}
    start = ids.index(BOS)
    mask = ids.index(GMASK if GMASK in ids else MASK)
    frozen = not (early and GMASK in ids)
    first = [mask if i >= start and frozen else i for i in range(len(ids))]
    second = [0] * start + list(range(1, len(ids) - start + 1))
    positions = np.array([first, second], float)
    masked = np.array([[k > q and k >= start for k in range(len(ids))] for q in range(len(ids))])
    h, alpha = tensors["transformer.word_embeddings.weight"][ids], sqrt(2 * L)
    for i in range(L):
        prefix = f"transformer.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        a = layer_norm(h, own["input_layernorm.weight"], own["input_layernorm.bias"])
        h = alpha * a + attend(a, own, i, positions, masked, scaled)
        m = layer_norm(h, own["post_attention_layernorm.weight"], own["post_attention_layernorm.bias"])
        inner = gelu(m @ own["mlp.dense_h_to_4h.weight"].T + own["mlp.dense_h_to_4h.bias"])
        h = alpha * m + inner @ own["mlp.dense_4h_to_h.weight"].T + own["mlp.dense_4h_to_h.bias"]
    h = layer_norm(h, *(tensors[f"transformer.final_layernorm.{kind}"] for kind in ("weight", "bias")))
    return h @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("early", [False, True])
def test_logits_are_those_of_the_formulas(x64, folder, pretrained, early):
    prepared = chatglm.prepare(ROWS, **SPECIAL, early=early)
    model = pretrained.model
    logits = np.asarray(model.apply(pretrained.params, prepared.tokens, **prepared.arguments))
    for row, ids in enumerate(ROWS):
        wanted = forward(folder, ids, early=early)
        np.testing.assert_allclose(logits[row, -len(ids) :], wanted, atol=1e-9 * abs(wanted).max())


def test_the_factor_of_the_layer_changes_nothing(folder):
    """Dividing the scores of layer l by l + 1 and multiplying them again is the identity."""
    np.testing.assert_allclose(forward(folder, ROWS[1], False), forward(folder, ROWS[1], True), atol=1e-10)


def test_positions_of_the_two_rules():
    late = chatglm.prepare(ROWS[1:], **SPECIAL).positions
    assert late[0].tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [2, 3], [2, 4], [2, 5]]
    assert late[1].tolist() == [[0, 0], [0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [2, 1], [2, 2]]
    early = chatglm.prepare(ROWS[1:], **SPECIAL, early=True).positions
    assert early[0].tolist() == [[0, 0], [1, 0], [2, 0], [3, 1], [4, 2], [5, 3], [6, 4], [7, 5]]
    np.testing.assert_array_equal(early[1], late[1])


def test_decoding_goes_on_as_the_whole_text(x64, folder, pretrained):
    """Tokens after the prompt, one by one with a cache, have the logits of the text in one."""
    model, params = pretrained.model, pretrained.params
    prompts, more = [[3, 9, 27, 5, GMASK, BOS], [7, GMASK, BOS]], np.array([[4, 20, 31], [9, 9, 2]])
    prepared = chatglm.prepare(prompts, **SPECIAL)
    positions, cache = prepared.positions, Cache.empty(2, 9)
    logits, cache = model.apply(params, prepared.tokens, cache=cache, last=True, **prepared.arguments)
    read = jax.jit(model.apply, static_argnames=("last",))
    wanted = [forward(folder, [*prompt, *row.tolist()]) for prompt, row in zip(prompts, more)]
    for step in range(4):
        for row, whole in enumerate(wanted):
            place = len(prompts[row]) - 1 + step
            np.testing.assert_allclose(logits[row, 0], whole[place], atol=1e-9 * abs(whole).max())
        if step < 3:
            positions = model.config.positions.advance(positions)
            token = more[:, step, None]
            logits, cache = read(params, token, positions=positions, cache=cache, last=True)


def test_out_and_in_again_are_the_same_bits(folder, tmp_path):
    first = load_pretrained(folder)
    save_pretrained(tmp_path / "back", first.model, first.params, settings=first.settings)
    again = load_pretrained(tmp_path / "back")
    assert again.model == first.model and again.settings["mask_token_id"] == MASK
    save_pretrained(tmp_path / "bare", first.model, first.params, architecture="ChatGLMModel")
    assert load_pretrained(tmp_path / "bare").model == first.model
    for one, two in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
    before, after = TensorFiles.open(folder), TensorFiles.open(tmp_path / "back")
    assert {n for n in set(before.names) - set(after.names) if "inv_freq" not in n} == {"lm_head.weight"}
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in after.names)


def test_the_published_model_has_its_parameters():
    config = chatglm.read(Settings({}))
    assert parameter_count(Transformer(config)) == 6_173_286_400
    assert config.residual.alpha == 7.483314773547883
    untied = Transformer(chatglm.read(Settings({"tie_word_embeddings": False})))
    assert parameter_count(untied) == 6_173_286_400 + 130_528 * 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_bit": 4}, r"quantization_bit \(valid: 0; load the weights in float16"),
        ({"pre_seq_len": 128}, r"pre_seq_len, .* P-tuning's prefixes are not imported"),
        ({"position_encoding_2d": False}, r"position_encoding_2d=False \(valid: True\)"),
        ({"multi_query_attention": True}, r"multi_query_attention=True \(unknown key"),  # ChatGLM2
    ],
)
def test_options_that_cannot_be_had(folder, tmp_path, changes, message):
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, **changes}))
    with pytest.raises(InputError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [([1, GMASK], r"rows\[0\] has no bos \(token 44\)"), ([1, BOS], r"rows\[0\] has no gmask or mask")],
)
def test_prompts_need_their_special_tokens(row, message):
    with pytest.raises(InputError, match=message):
        chatglm.prepare([row], **SPECIAL)


def test_a_loaded_model_prepares_with_its_own_special_tokens(pretrained):
    one, two = pretrained.prepare(ROWS), chatglm.prepare(ROWS, **SPECIAL)
    np.testing.assert_array_equal(one.positions, two.positions)
    np.testing.assert_array_equal(one.tokens, two.tokens)
