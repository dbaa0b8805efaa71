"""Greedy continuations against somebody else's: ours without a cache, or those of transformers.

A difference is allowed only where the other's own two largest logits are closer than `GAP`: there rounding
decides. Such places are counted; after one, the rest of the row is another text and is not compared.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from modicum.models.generation import Sampling, generate

GAP = 1e-4


@partial(jax.jit, static_argnums=0)
def full_forward(model, params, tokens, segments, decoder_tokens):
    """Logits of the whole text at once, without a cache."""
    if model.config.kind == "encoder-decoder":
        return model.apply(params, tokens, segments=segments, decoder_tokens=decoder_tokens)
    return model.apply(params, tokens, segments=segments)


def slow_greedy(model, params, prompt, new, start=None, width=40):
    """`new` tokens after one prompt, the whole text read again for each; with the gaps of the top two.

    `start` are the ids with which the decoder of an encoder-decoder starts. Texts are padded to `width` on
    the right, where no token looks, so that all are one program.
    """
    source, segments = np.zeros((2, 1, width), np.int32)
    source[0, : len(prompt)], segments[0, : len(prompt)] = prompt, 1
    text = list(prompt if start is None else start)
    first, gaps, row = len(text), [], np.zeros((1, width), np.int32)
    for _ in range(new):
        row[0, : len(text)] = text
        if start is None:
            real = (np.arange(width) < len(text))[None].astype(np.int32)
            logits = full_forward(model, params, row, real, None)
        else:
            logits = full_forward(model, params, source, segments, row)
        logits = np.asarray(logits[0, len(text) - 1, : model.config.vocab])
        low, high = np.sort(logits)[-2:]
        gaps.append(high - low)
        text.append(int(logits.argmax()))
    return text[first:], gaps


def agree(ours, theirs, gaps):
    """Whether the tokens agree up to the first near tie, and how many near ties ended a comparison (0, 1)."""
    for mine, other, gap in zip(ours, theirs, gaps):
        if int(mine) != int(other):
            return gap < GAP, 1
    return len(ours) == len(theirs), 0


def peer_greedy(theirs, prompts, new, pad, start=None, penalty=1.0):
    """What transformers' `generate(do_sample=False)` adds to left-padded prompts, and the top two's gaps."""
    import torch

    torch.set_num_threads(1)
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), pad), np.zeros((len(prompts), width), int)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    options = {} if start is None else {"decoder_start_token_id": start}
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            repetition_penalty=penalty,
            output_scores=True,
            **options,
        )
    tokens = out.sequences[:, 1 if start is not None else width :].numpy()
    top = torch.stack(out.scores, 1).topk(2).values.numpy()
    return tokens, top[..., 0] - top[..., 1]


def assert_greedy_equal(model, params, theirs, prompts, new=64, pad=0, start=None, penalty=1.0):
    """Our greedy continuations of all prompts in one batch are transformers'; returns how many near ties."""
    options = {} if start is None else {"decoder_tokens": start}
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    ours = generate(model, params, prompts, max_new_tokens=new, sampling=sampling, **options)
    tokens, gaps = peer_greedy(theirs, prompts, new, pad, start, penalty)
    ties = 0
    for row in range(len(prompts)):
        same, tie = agree(ours.tokens[row], tokens[row], gaps[row])
        assert same, f"row {row}: {ours.tokens[row].tolist()} is not {tokens[row].tolist()}"
        ties += tie
    return ties


def varied(params, spread=6.0):
    """Parameters with larger matrices, so that the continuation of a random model does not repeat itself."""
    return jax.tree.map(lambda x: x * (spread if jnp.ndim(x) > 1 else 1), params)
