"""Our decoders as EleutherAI's lm-eval sees a model, so that its tasks score them.

    from lm_eval import simple_evaluate
    adapter = harness_model(model, params, encode=..., decode=..., end=tokenizer.eos, max_length=1024)
    results = simple_evaluate(adapter, tasks=["hellaswag"])

The package (https://github.com/EleutherAI/lm-evaluation-harness, `pip install lm_eval`) is imported when
`harness_model` is called. Its `TemplateLM` splits texts into context and continuation and cuts rolling
windows, so that these are its own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from ... import InputError
from ...models import Params, Transformer
from ...models.generation import GREEDY, Sampling, generate, unrolled
from ...parallel import Layout
from .scoring import score_continuations

NEW_TOKENS = 256
"""How many tokens a request gets that does not say; lm-eval's own default."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Wanted(NamedTuple):
    """What a request asks of its continuation."""

    until: tuple[str, ...]
    new: int
    sampling: Sampling


def harness_model(
    model: Transformer,
    params: Params,
    *,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    end: int,
    max_length: int = 0,
    prefix: int | None = None,
    rows: int = 8,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    layout: Layout | None = None,
) -> Any:
    """An `lm_eval.api.model.TemplateLM` that answers with a decoder of ours.

    encode      text to ids, without special tokens; `decode` ids to text
    end         the id that ends a text; `prefix` (default: `end`) is what an empty context is replaced by
    max_length  tokens that the model sees at once (0: as many as it has positions)
    rows        texts that are read at once
    new_tokens  length of a continuation where the request does not say

    Raises InputError where lm-eval is missing or the model is no decoder.
    """
    if model.config.kind != "decoder":
        raise InputError(f"the model is of kind {model.config.kind!r}; lm-eval's adapter takes decoders")
    limit = max_length or model.config.positions.limit
    if limit is None:
        raise InputError("the model has no limit of positions: give max_length, the tokens seen at once")
    model.config.positions.require(limit)
    model, params = unrolled(model, params)
    adapter = _adapter()()
    adapter.model, adapter.params, adapter.layout = model, params, layout
    adapter.encode, adapter.decode, adapter.end = encode, decode, end
    adapter.prefix, adapter.max_length = end if prefix is None else prefix, limit
    adapter.rows, adapter.new_tokens, adapter.seed = rows, new_tokens, seed
    return adapter


@cache
def _adapter() -> type:
    """The class of adapters; made when it is needed, as its base is lm-eval's."""
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise InputError(
            f"lm-eval cannot be imported ({error}); install it by: pip install lm_eval"
        ) from error

    class HarnessModel(TemplateLM):
        """The protocol of lm-eval on top of `score_continuations` and `generate`."""

        @property
        def eot_token_id(self) -> int:
            return self.end

        @property
        def prefix_token_id(self) -> int:
            return self.prefix

        @property
        def tokenizer_name(self) -> str:
            return "modicum"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return [int(each) for each in self.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            scores = [tuple(score) for score in self._scores(pairs)]
            for (texts, _, _), score in zip(requests, scores):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
            return scores

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return _rolling(self, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return _continuations(self, requests)

        def _scores(self, pairs: Any) -> Any:
            place = {"limit": self.max_length, "rows": self.rows, "layout": self.layout}
            return score_continuations(self.model, self.params, pairs, **place)

    return HarnessModel


def _rolling(adapter: Any, requests: Sequence[Any]) -> list[float]:
    """The log-likelihood of each whole text, in windows that score each token once (lm-eval's own)."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows, owners = [], []
    for index, request in enumerate(requests):
        ids, limit = adapter.tok_encode(request.args[0]), adapter.max_length
        for window in get_rolling_token_windows(ids, adapter.prefix, limit, 1):
            windows.append(make_disjoint_window(window))
            owners.append(index)
    totals = [0.0] * len(requests)
    for index, score in zip(owners, adapter._scores(windows)):
        totals[index] += score.log_likelihood
    for request, total in zip(requests, totals):
        adapter.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals


def _continuations(adapter: Any, requests: Sequence[Any]) -> list[str]:
    """The continuation of each request's context, cut before what ended it."""
    groups: dict[Wanted, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(wanted(request.args[1], adapter.new_tokens), []).append(index)
    contexts = [adapter.tok_encode(request.args[0]) or [adapter.prefix] for request in requests]
    texts = [""] * len(requests)
    for asked, members in groups.items():
        members.sort(key=lambda index: -len(contexts[index]))
        for start in range(0, len(members), adapter.rows):
            chosen = members[start : start + adapter.rows]
            for index, text in zip(chosen, _continue(adapter, [contexts[i] for i in chosen], asked, chosen)):
                texts[index] = text
                adapter.cache_hook.add_partial("generate_until", requests[index].args, text)
    return texts


def _continue(adapter: Any, contexts: list[list[int]], asked: Wanted, indices: Sequence[int]) -> list[str]:
    """Texts after some contexts, filled up to the adapter's rows so that all batches are one program."""
    room = adapter.max_length - asked.new
    if room < 1:
        raise InputError(f"max_gen_toks={asked.new} leaves no room in max_length={adapter.max_length}")
    rows = [context[-room:] for context in contexts]
    rows += rows[-1:] * (adapter.rows - len(rows))
    keys = None
    if not asked.sampling.greedy:  # a request's sample is its own, whatever it is batched with
        numbers = np.asarray([*indices, *indices[-1:] * (adapter.rows - len(indices))], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(adapter.seed), numbers)
    generated = generate(
        adapter.model,
        adapter.params,
        rows,
        max_new_tokens=asked.new,
        sampling=asked.sampling,
        rng=keys,
        stop_tokens=adapter.end,
        stop_sequences=asked.until,
        text_of=adapter.decode,
        layout=adapter.layout,
    )
    own = generated.rows()[: len(contexts)]
    return [_cut(adapter.decode([i for i in row.tolist() if i != adapter.end]), asked.until) for row in own]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of these strings."""
    for string in until:
        text = text.split(string)[0]
    return text


def wanted(arguments: Mapping[str, Any], new_tokens: int = NEW_TOKENS) -> Wanted:
    """A request's generation arguments; raises InputError for one that has no meaning here.

    Sampling is greedy unless `do_sample` or, without it, a temperature above 0 asks for more.
    """
    left = dict(arguments)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in LENGTHS]
    new = next((int(each) for each in lengths if each is not None), new_tokens)
    sample = left.pop("do_sample", None)
    numbers = {name: left.pop(name) for name in SAMPLING if left.get(name) is not None}
    if left.pop("num_beams", 1) != 1 or left:
        names = ", ".join(["until", "do_sample", *LENGTHS, *SAMPLING])
        raise InputError(f"generation arguments have {min(left, default='num_beams')!r}; valid: {names}")
    if sample is False or (sample is None and not numbers.get("temperature")):
        penalty = numbers.get("repetition_penalty", 1.0)
        sampling = GREEDY if penalty == 1 else Sampling(temperature=0.0, repetition_penalty=penalty)
    else:
        sampling = Sampling(**numbers)
    return Wanted(tuple([until] if isinstance(until, str) else until), new, sampling)
