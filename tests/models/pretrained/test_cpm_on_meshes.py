"""CPM-Ant, CPM-Bee and ChatGLM read to several devices, scanned and not, and generating there."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    MLP,
    ExtendedHead,
    GatedMLP,
    LanguageModelHead,
    Layer,
    NormedResidual,
    PreNorm,
    RMSNorm,
    Rotary2D,
    SegmentRelations,
    Transformer,
    TransformerConfig,
    TreeRelations,
    multi_head,
    stack_layers,
)
from modicum.models.generation import generate
from modicum.models.pretrained import load_pretrained, save_pretrained
from modicum.parallel import Layout, MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

CPM = TransformerConfig(
    layers=2,
    width=16,
    vocab=32,
    attention=multi_head(4, head_width=6, bias=False),
    mlp=GatedMLP(24, "gelu"),
    norm=RMSNorm(),
    embedding_scale=0.25,
    logit_scale=0.25,
    scaled_linears=True,
)
ANT = replace(CPM, positions=SegmentRelations(4, 16, 20, 0.25, prompt_length=2), input_rows=8)
BEE = replace(CPM, positions=TreeRelations(16, 48, 20), residual=PreNorm(divisor=1.05))
GLM = TransformerConfig(
    layers=2,
    width=32,
    vocab=32,
    attention=multi_head(4),
    mlp=MLP(40, "gelu_tanh"),
    positions=Rotary2D(),
    residual=NormedResidual(math.sqrt(4)),
)
MODELS = {
    "CPMAnt": Transformer(ANT, LanguageModelHead()),
    "CPMBee": Transformer(BEE, ExtendedHead()),
    "ChatGLMModel": Transformer(GLM, LanguageModelHead()),
}
TOKENS = np.arange(16).reshape(2, 8)
BOS, GMASK = 30, 31


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory, random_parameters):
    """(model, parameters, folder) of one architecture."""
    model = MODELS[request.param]
    params = random_parameters(model, TOKENS)
    folder = tmp_path_factory.mktemp("models") / request.param
    special = {"model_type": "chatglm", "bos_token_id": BOS, "gmask_token_id": GMASK}
    settings = special if request.param == "ChatGLMModel" else None
    save_pretrained(folder, model, params, architecture=request.param, settings=settings)
    return model, params, folder


def written_tokens(loaded, layout=None):
    """What a model writes after two prompts, all by itself, or for CPM-Bee its logits of them."""
    rows = [[3, 4, 5, GMASK, BOS], [7, GMASK, BOS]]
    if isinstance(loaded.model.head, ExtendedHead):
        return np.asarray(jax.jit(loaded.model.apply)(loaded.params, TOKENS))
    given = loaded.prepare(rows)
    inputs = {"segments": given.segments, "inputs": given.inputs, "layout": layout}
    return generate(loaded.model, loaded.params, given.tokens, max_new_tokens=6, **inputs).tokens


@pytest.mark.parametrize(("mesh", "scan"), [("tensor=2", False), ("data=2,fsdp=2,tensor=2", True)])
def test_on_a_mesh(written, mesh, scan):
    _, params, folder = written
    shape = MeshShape.parse(mesh)
    layout = Layout(make_mesh(shape, jax.devices()[: shape.size]), zero=3, minimum=1)
    loaded = load_pretrained(folder, layout=layout, scan=scan)
    placed = layout.parameters(loaded.params, loaded.model.axes)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded.params, placed))
    same = jax.tree.map(np.array_equal, loaded.params, stack_layers(params) if scan else params)
    assert jax.tree.all(same)
    wanted = written_tokens(load_pretrained(folder))
    np.testing.assert_allclose(written_tokens(loaded, layout), wanted, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize(
    ("architecture", "config", "word"),
    [
        ("CPMAnt", replace(ANT, scaled_linears=False), "scaled_linears=False"),
        ("CPMAnt", replace(ANT, positions=TreeRelations()), "positions=TreeRelations"),
        ("CPMBee", replace(BEE, residual=PreNorm()), "residual is PreNorm"),
        (
            "CPMBee",
            replace(BEE, pattern=(Layer(mlp=GatedMLP(8, "gelu")), Layer())),
            "cannot express this model: layer_0=",
        ),
        (
            "ChatGLMModel",
            replace(GLM, residual=NormedResidual(1.0)),
            "alpha=1.0; a ChatGLM of 2 layers has 2.0",
        ),
        ("ChatGLMModel", replace(GLM, mlp=MLP(40, "relu")), "activation='relu'"),
    ],
)
def test_what_a_family_cannot_express_is_refused(tmp_path, random_parameters, architecture, config, word):
    model = Transformer(config, MODELS[architecture].head)
    params = random_parameters(model, TOKENS)
    with pytest.raises(InputError) as error:
        save_pretrained(tmp_path / "out", model, params, architecture=architecture)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
