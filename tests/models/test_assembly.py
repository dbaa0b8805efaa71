"""What published architectures add to the Transformer: each against its formula."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import (
    FP64,
    MLP,
    ClassifierHead,
    Layer,
    Learned,
    MaskedLanguageModelHead,
    NormedResidual,
    Pooler,
    PreNorm,
    RMSNorm,
    Transformer,
    TransformerConfig,
    multi_head,
    run_with_cache,
)
from modicum.models.word_scores import MASKED_LOGIT
from modicum.research import delta

pytestmark = pytest.mark.usefixtures("quick_compile", "x64")

TOKENS = np.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
SEGMENTS = (TOKENS > 0).astype(np.int32)
CONFIG = TransformerConfig(
    layers=2, width=8, vocab=7, attention=multi_head(2), mlp=MLP(12), positions=Learned(6), precision=FP64
)


def run(config, random_parameters, head=None, names=(), **inputs):
    """Parameters, outputs and the named activations of the model."""
    model = Transformer(config, head)
    params = random_parameters(model, TOKENS)
    output, seen = run_with_cache(model, params, TOKENS, names=names, **inputs)
    return params, output, seen


def close(have, want):
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-12)


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def normalised(params, x, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * params["scale"] + params["bias"]


def test_token_types_add_a_vector(random_parameters):
    config, types = replace(CONFIG, token_types=3), np.array([[0, 1, 2, 2, 0], [1, 1, 1, 0, 2]])
    params, _, seen = run(config, random_parameters, names=["embedded"], token_types=types)
    words = params["embedding"]["table"][TOKENS] + params["position_embedding"]["table"][np.arange(5)]
    close(seen["embedded"], words + params["type_embedding"]["table"][types])


def test_learned_positions_may_begin_further_down_their_table(random_parameters):
    config = replace(CONFIG, positions=Learned(6, offset=2))
    params, _, seen = run(config, random_parameters, names=["embedded"])
    table = params["position_embedding"]["table"]
    assert table.shape == (8, 8)
    close(seen["embedded"], params["embedding"]["table"][TOKENS] + table[2:7])


def test_a_narrow_embedding_is_projected_on_both_ends(random_parameters):
    config = replace(CONFIG, embedding_width=4)
    params, logits, seen = run(
        config, random_parameters, Transformer(config).head, ["embedding_projection", "final_norm"]
    )
    table = params["embedding"]["table"]
    assert table.shape == (7, 4)
    close(seen["embedding_projection"], table[TOKENS] @ params["embedding_projection"]["kernel"])
    close(logits, seen["final_norm"] @ params["head"]["projection"]["kernel"] @ table.T)


def test_rows_after_the_vocabulary_are_inputs_without_logits(random_parameters):
    config = replace(CONFIG, vocab=5, input_rows=2, vocab_multiple=4)
    params, logits, _ = run(config, random_parameters, Transformer(config).head)
    assert params["embedding"]["table"].shape == (8, 8)
    assert (np.asarray(logits[..., 5:]) == MASKED_LOGIT).all() and (np.abs(logits[..., :5]) < 1e3).all()


def test_scaled_linears_divide_by_the_root_of_their_input(random_parameters):
    names = ["layers_0/mlp/up", "layers_0/mlp_norm", "layers_0/mlp/act", "layers_0/mlp/down"]
    config = replace(CONFIG, scaled_linears=True, mlp=MLP(12, bias=False))
    params, _, seen = run(config, random_parameters, names=names)
    mlp = params["layers_0"]["mlp"]
    close(seen[names[0]], seen[names[1]] @ mlp["up"]["kernel"] / np.sqrt(8))
    close(seen[names[3]], seen[names[2]] @ mlp["down"]["kernel"] / np.sqrt(12))


def test_a_delta_does_not_merge_into_scaled_products():
    model = Transformer(replace(CONFIG, scaled_linears=True))
    params = model.init(jax.random.key(0), TOKENS)
    tuned = delta.attach(model, {"attention/query": delta.LoRA(rank=2)})
    with pytest.raises(InputError, match="scaled_linears=True"):
        tuned.merge(params, tuned.init(jax.random.key(1), params, TOKENS))


def test_a_residual_may_be_divided(random_parameters):
    names = ["embedded", "attention", "layers_0/middle"]
    config = replace(CONFIG, layers=1, residual=PreNorm(divisor=1.05))
    _, _, seen = run(config, random_parameters, names=names)
    close(seen["layers_0/middle"], (seen["embedded"] + seen["layers_0/attention"]) / 1.05)


def test_a_residual_may_go_on_from_the_norm(random_parameters):
    names = ["embedded", "attention_norm", "attention", "layers_0/middle"]
    config = replace(CONFIG, layers=1, residual=NormedResidual(alpha=3.0))
    params, _, seen = run(config, random_parameters, names=names)
    normed = normalised(params["layers_0"]["attention_norm"], seen["embedded"])
    close(seen["layers_0/attention_norm"], normed)
    close(seen["layers_0/middle"], 3.0 * normed + seen["layers_0/attention"])


def test_a_layer_may_lack_a_sublayer(random_parameters):
    config = replace(CONFIG, pattern=(Layer(without=("attention",)), Layer(without=("mlp",))))
    params, _, seen = run(config, random_parameters, names=["embedded", "layers_0/middle", "layers_1/.*"])
    assert set(params["layers_0"]) == {"mlp_norm", "mlp"}
    assert set(params["layers_1"]) == {"attention_norm", "attention"}
    close(seen["layers_0/middle"], seen["embedded"])
    close(seen["layers_1/residual"], seen["layers_1/middle"])


def test_queries_and_keys_are_normalised_for_each_head(random_parameters):
    config = replace(CONFIG, layers=1, norm=RMSNorm(), attention=replace(multi_head(2), query_key_norm=True))
    params, _, seen = run(config, random_parameters, names=["attention/query", "attention/query_norm"])
    heads = np.asarray(seen["layers_0/attention/query"]).reshape(2, 5, 2, 4)
    rms = np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6)
    scale = params["layers_0"]["attention"]["query_norm"]["scale"]
    close(seen["layers_0/attention/query_norm"], heads / rms * scale)


def test_an_output_may_lack_the_bias_that_the_other_projections_have(random_parameters):
    config = replace(CONFIG, attention=replace(multi_head(2), output_bias=False))
    params, _, _ = run(config, random_parameters)
    attention = params["layers_0"]["attention"]
    assert "bias" in attention["query"] and "bias" not in attention["output"]


def test_a_mask_replaces_the_configured_one(random_parameters):
    from modicum.models.kernels import Full

    _, causal, _ = run(CONFIG, random_parameters)
    _, full, _ = run(CONFIG, random_parameters, mask=Full(), segments=SEGMENTS)
    _, encoder, _ = run(replace(CONFIG, kind="encoder"), random_parameters, segments=SEGMENTS)
    close(full, encoder)
    assert np.abs(np.asarray(full - causal)[:, 0]).max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_masked_language_model_head(tied, random_parameters):
    config = replace(CONFIG, tied=tied, kind="encoder")
    params, logits, seen = run(config, random_parameters, MaskedLanguageModelHead(), ["final_norm"])
    head = params["head"]
    hidden = jax.nn.gelu(dense(head["transform"], seen["final_norm"]), approximate=False)
    weights = params["embedding"]["table"].T if tied else head["kernel"]
    close(logits, normalised(head["norm"], hidden) @ weights + head["bias"])


def test_pooler_reads_the_first_real_token(random_parameters):
    segments = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    params, pooled, seen = run(CONFIG, random_parameters, Pooler(), ["final_norm"], segments=segments)
    first = seen["final_norm"][np.arange(2), [1, 0]]
    close(pooled, jnp.tanh(dense(params["pooler"], first)))


def test_classifier_with_a_pooler(random_parameters):
    head = ClassifierHead(3, pooling="first", pooler="tanh")
    params, logits, seen = run(CONFIG, random_parameters, head, ["final_norm"])
    pooled = jnp.tanh(dense(params["classifier"]["pooler"], seen["final_norm"][:, 0]))
    close(logits, dense(params["classifier"], pooled))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Layer(without=("norm",)), "without 'norm'"),
        (lambda: replace(CONFIG, token_types=-1), "token_types=-1"),
        (lambda: Transformer(CONFIG).init(jax.random.key(0), TOKENS, token_types=TOKENS), "token_types=0"),
        (lambda: replace(CONFIG, decoder_layers=3, pattern=(Layer(), Layer())), "3 layers"),
    ],
)
def test_impossible_parts_are_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
