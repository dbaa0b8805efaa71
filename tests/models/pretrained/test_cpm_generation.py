"""`generate` continues texts of CPM-Ant as `transformers` does, and of ChatGLM as reading them whole does."""

import jax
import numpy as np
import pytest

from modicum.models import LayerNorm, NormedResidual, Rotary2D, Transformer, TransformerConfig, multi_head
from modicum.models.generation import generate, stream
from modicum.models.mlp import MLP
from modicum.models.pretrained import chatglm

pytestmark = pytest.mark.usefixtures("quick_compile")

NEW, GAP = 64, 1e-4
BOS, GMASK = 44, 41


def agreed(ours, theirs, gaps):
    """How many leading tokens agree; a difference is allowed only where the top two are a near tie."""
    for place, (one, two, gap) in enumerate(zip(ours, theirs, gaps)):
        if one != two:
            assert gap < GAP, f"token {place}: {one} is not {two}, whose lead is {gap}"
            return place
    return len(ours)


@pytest.mark.peers
def test_cpm_ant_continues_as_transformers(oracle, tmp_path):
    from modicum.models.pretrained import cpm_ant, load_pretrained

    transformers, torch = oracle.transformers, oracle.torch
    torch.manual_seed(1)
    config = transformers.CpmAntConfig(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=48,
        num_hidden_layers=2,
        position_bias_num_buckets=16,
        position_bias_max_distance=24,
        prompt_types=4,
        prompt_length=6,
        segment_types=5,
        init_std=0.3,
        tie_word_embeddings=False,
    )
    theirs = oracle.perturbed(transformers.CpmAntForCausalLM(config))
    with torch.no_grad():
        theirs.cpmant.input_embedding.weight.mul_(6)  # else a random model repeats one word
        theirs.cpmant.segment_embedding.weight.mul_(0.3)
        for layer in theirs.cpmant.encoder.layers:
            layer.self_att.self_attention.attention_out.weight.mul_(4)
        theirs.lm_head.weight[0] = 0  # id 0 is padding to transformers, so neither may write it
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(5)
    rows = [rng.integers(1, 61, n).tolist() for n in (11, 5, 8)]
    given = np.array([[0] * (11 - len(row)) + row for row in rows])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}
    expected = theirs.generate(
        torch.as_tensor(given),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    top = torch.stack(expected.scores, 1).topk(2).values.numpy()
    pretrained = load_pretrained(tmp_path)
    model, params = pretrained.model, pretrained.params
    prepared = cpm_ant.prepare(rows, model.config)
    found = generate(
        model,
        params,
        prepared.tokens,
        segments=prepared.segments,
        inputs=prepared.inputs,
        max_new_tokens=NEW,
    )
    counts = [
        agreed(found.tokens[row], expected.sequences[row, 11:].tolist(), top[row, :, 0] - top[row, :, 1])
        for row in range(3)
    ]
    ties = sum(count < NEW for count in counts)
    print(f"{sum(counts)} of {3 * NEW} tokens are those of transformers, {ties} near ties")
    assert (found.tokens[:, :NEW] > 0).all() and len(np.unique(found.tokens)) > 9


def test_chatglm_continues_as_the_whole_text_read_anew(x64, random_parameters):
    config = TransformerConfig(
        layers=2,
        width=32,
        vocab=50,
        attention=multi_head(2),
        mlp=MLP(40, "gelu_tanh"),
        norm=LayerNorm(),
        positions=Rotary2D(),
        residual=NormedResidual(2.0),
    )
    model = Transformer(config)
    params = random_parameters(model, np.zeros((1, 4), np.int32), std=0.4)
    prompts = [[3, 9, 27, 5, 12, GMASK, BOS], [7, GMASK, BOS]]
    special = {"bos": BOS, "gmask": GMASK, "mask": 40}
    prepared = chatglm.prepare(prompts, **special)
    arguments = {"segments": prepared.segments, "inputs": prepared.inputs, "max_new_tokens": 12}
    found = generate(model, params, prepared.tokens, **arguments).tokens
    whole = [np.stack(list(stream(model, params, prepared.tokens, **arguments)), 1)]
    np.testing.assert_array_equal(found, whole[0])

    @jax.jit
    def read(tokens, segments, positions, mask):
        return model.apply(params, tokens, segments=segments, positions=positions, mask=mask, last=True)

    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for place in range(12):
            again = chatglm.prepare([text], **special)
            logits = np.asarray(read(again.tokens, **again.arguments))[0, 0]
            two = np.sort(logits)[-2:]
            assert found[row, place] == logits.argmax() or two[1] - two[0] < GAP
            text.append(int(found[row, place]))
