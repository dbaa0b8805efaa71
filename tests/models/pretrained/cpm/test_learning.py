"""What a small CPM-Bee learns from packed rows it answers from its cache: the two layouts are one model's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modicum.models import (
    ExtendedHead,
    GatedMLP,
    PreNorm,
    RMSNorm,
    Transformer,
    TransformerConfig,
    TreeRelations,
    multi_head,
)
from modicum.models.pretrained.cpm import BeeTokenizer, Vocabulary, answer, encode, pack

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = [
    "<pad>",
    "<unk>",
    "<mask>",
    "<sep>",
    "\n",
    " ",
    "<s>",
    "</s>",
    "<root>",
    "<ans>",
    "<option>",
    "input",
]
WORDS += [*"abcdef"]
TASKS = [
    {"input": "a<mask_0>b<mask_1>", "<ans>": {"<mask_0>": "cd", "<mask_1>": "e"}},
    {"input": "b<mask_0>a<mask_1>", "<ans>": {"<mask_0>": "f", "<mask_1>": "cc"}},
    {"input": "d", "<option_0>": "e", "<option_1>": "f", "<ans>": "<option_1>"},
    {"input": "c", "<option_0>": "e", "<option_1>": "f", "<ans>": "<option_0>"},
    {"input": "ab zz", "<ans>": "zzb"},
]


def test_answers_are_those_that_were_learned():
    tokenizer = BeeTokenizer(Vocabulary({word: number for number, word in enumerate(WORDS)}))
    config = TransformerConfig(
        layers=2,
        width=32,
        vocab=len(WORDS),
        attention=multi_head(4, bias=False),
        mlp=GatedMLP(64, "gelu"),
        norm=RMSNorm(),
        positions=TreeRelations(16, 64, 20),
        residual=PreNorm(divisor=1.05),
        embedding_scale=32**-0.5,
        logit_scale=32**-0.5,
        scaled_linears=True,
        initial_std=1.0,
    )
    model = Transformer(config, ExtendedHead())
    batch = pack([encode(task, tokenizer) for task in TASKS], tokenizer, length=80)
    params = model.init(jax.random.key(0), jnp.asarray(batch.tokens[:1, :2]))
    optimizer = optax.adam(3e-2)

    def loss(params):
        logits = model.apply(params, batch.tokens, **batch.arguments)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(batch.targets, 0))
        return jnp.where(batch.targets >= 0, losses, 0).sum() / (batch.targets >= 0).sum()

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            change, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, change), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=120)
        return params, losses

    params, losses = learn(params)
    assert losses[-1] < 0.02 < losses[0]
    blank = [{**task, "<ans>": blanked(task["<ans>"])} for task in TASKS]
    found = answer(model, params, tokenizer, blank)
    assert [each.data for each in found] == TASKS and all(each.finished for each in found)


def blanked(answers):
    return dict.fromkeys(answers, "") if isinstance(answers, dict) else ""
