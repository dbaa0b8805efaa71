"""Without peers: models made here, written as a family and read back, scanned and on several devices too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    ClassifierHead,
    GatedMLP,
    GroupedQuery,
    LanguageModelHead,
    LayerNorm,
    Learned,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Transformer,
    TransformerConfig,
    stack_layers,
)
from modicum.models.heads import MaskedLanguageModelHead, Pooler
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.models.pretrained.t5 import encoder_of
from modicum.parallel import Layout, MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

BERT = TransformerConfig(
    kind="encoder",
    layers=2,
    width=16,
    vocab=32,
    attention=GroupedQuery(4),
    mlp=MLP(24),
    norm=LayerNorm(1e-12),
    positions=Learned(8),
    residual=PostNorm(),
    embedding_norm=True,
    token_types=2,
)
T5 = TransformerConfig(
    kind="encoder-decoder",
    layers=2,
    width=16,
    vocab=32,
    attention=GroupedQuery(4, head_width=6, bias=False, scale=1.0),
    mlp=GatedMLP(24, "gelu_tanh"),
    norm=RMSNorm(),
    positions=RelativeBuckets(8, 10),
    residual=PreNorm(),
    tied=False,
)
OPT = TransformerConfig(
    layers=2,
    width=16,
    vocab=32,
    attention=GroupedQuery(4),
    mlp=MLP(24, "relu"),
    positions=Learned(8, 2),
    residual=PostNorm(),
    embedding_width=8,
    tied=False,
)
MODELS = {
    "BertModel": Transformer(BERT, Pooler()),
    "BertForMaskedLM": Transformer(BERT, MaskedLanguageModelHead()),
    "BertForSequenceClassification": Transformer(BERT, ClassifierHead(4, "first", "tanh")),
    "T5ForConditionalGeneration": Transformer(T5, LanguageModelHead()),
    "OPTForCausalLM": Transformer(OPT, LanguageModelHead()),
}
TOKENS = np.arange(16).reshape(2, 8)


def run(model, params):
    more = {"decoder_tokens": TOKENS[:, :5]} if model.config.kind == "encoder-decoder" else {}
    return np.asarray(jax.jit(model.apply)(params, TOKENS, **more))


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory, random_parameters):
    """(model, parameters, folder) of one architecture."""
    model = MODELS[request.param]
    more = {"decoder_tokens": TOKENS} if model.config.kind == "encoder-decoder" else {}
    params = random_parameters(model, TOKENS, **more)
    folder = tmp_path_factory.mktemp("models") / request.param
    return model, params, save_pretrained(folder, model, params, architecture=request.param)


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.all(jax.tree.map(lambda one, two: np.array_equal(one, two), first, second))


def test_the_way_back(written):
    model, params, folder = written
    loaded = load_pretrained(folder)
    assert loaded.model.head == model.head and not loaded.left_out and not loaded.initialised
    same(loaded.params, params)


@pytest.mark.parametrize(("mesh", "scan"), [("tensor=2", False), ("data=2,fsdp=2,tensor=2", True)])
def test_on_a_mesh(written, mesh, scan):
    model, params, folder = written
    shape = MeshShape.parse(mesh)
    layout = Layout(make_mesh(shape, jax.devices()[: shape.size]), zero=3, minimum=1)
    loaded = load_pretrained(folder, layout=layout, scan=scan)
    shardings = layout.parameters(loaded.params, loaded.model.axes)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded.params, shardings))
    matrices = [x for x in jax.tree.leaves(loaded.params) if x.ndim == 2 + scan]
    spread = sum(not x.sharding.is_fully_replicated for x in matrices)
    assert spread >= len(matrices) - 4  # positions, token types, pooler and labels may be whole
    same(jax.tree.map(np.asarray, loaded.params), stack_layers(params) if scan else params)
    expected = run(model, params)
    np.testing.assert_allclose(run(loaded.model, loaded.params), expected, atol=1e-4 * abs(expected).max())


def test_half_the_bits(written):
    _, params, folder = written
    loaded = load_pretrained(folder, dtype="bfloat16", compute="float32")
    same(loaded.params, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params))


def test_what_a_family_cannot_express_is_refused(tmp_path):
    from dataclasses import replace

    windowed = replace(BERT, attention=GroupedQuery(4, window=3))
    causal = replace(BERT, kind="decoder")
    scaled = replace(OPT, embedding_scale=2.0)
    exact = replace(T5, mlp=GatedMLP(24, "gelu"))
    rotary = replace(T5, positions=Learned(8))
    for config, architecture, word in (
        (windowed, "BertModel", "window=3"),
        (causal, "BertModel", "kind=decoder"),
        (scaled, "OPTForCausalLM", "embedding_scale=2.0"),
        (exact, "T5Model", "activation='gelu'"),
        (rotary, "T5Model", "positions=Learned"),
    ):
        head = {"BertModel": Pooler(), "OPTForCausalLM": LanguageModelHead(), "T5Model": None}[architecture]
        model = Transformer(config, head)
        more = {"decoder_tokens": TOKENS} if config.kind == "encoder-decoder" else {}
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS, **more)
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        with pytest.raises(InputError) as error:
            save_pretrained(tmp_path / "out", model, params, architecture=architecture)
        assert word in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_the_encoder_of_a_whole_t5(tmp_path, random_parameters):
    whole = Transformer(T5, LanguageModelHead())
    params = random_parameters(whole, TOKENS, decoder_tokens=TOKENS)
    model, own = encoder_of(whole, params)
    save_pretrained(tmp_path / "out", model, own, architecture="T5EncoderModel")
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.model.config.kind == "encoder"
    same(loaded.params, own)
    assert run(loaded.model, loaded.params).shape == (2, 8, 16)
    save_pretrained(tmp_path / "whole", whole, params, architecture="T5ForConditionalGeneration")
    with pytest.raises(InputError, match=r"unknown tensors: decoder\."):
        load_pretrained(tmp_path / "whole", architecture="T5EncoderModel")
    with pytest.raises(InputError, match="not a encoder"):
        encoder_of(model, own)
