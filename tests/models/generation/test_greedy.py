"""Decoding with a cache gives the tokens that the model prefers when it reads the whole text anew."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modicum import InputError
from modicum.models import ClassifierHead, Transformer, stack_layers
from modicum.models.generation import beam_search, generate, stream, unrolled
from modicum.models.kernels import Full, Prefix

pytestmark = pytest.mark.usefixtures("quick_compile")


def neighbour(name):
    """A module beside this file; tests are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle, tiny = neighbour("greedy_oracle"), neighbour("conftest")
NEW = 20


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def case(request):
    """Model, parameters, prompts and their slow continuations with gaps."""
    model, params = tiny.build(tiny.CONFIGS[request.param])
    prompts = tiny.ragged(5, 19, 1)
    start = [1] if request.param == "encoder-decoder" else None
    slow = [oracle.slow_greedy(model, params, prompt, NEW, start) for prompt in prompts]
    options = {} if start is None else {"decoder_tokens": start[0]}
    return model, params, prompts, slow, options


def check(generated, slow):
    for row, (tokens, gaps) in zip(generated.tokens, slow):
        assert min(gaps) > oracle.GAP, "the test's own model is undecided: choose another seed"
        assert row.tolist() == tokens


def test_a_padded_batch_continues_each_row_as_if_alone(case):
    model, params, prompts, slow, options = case
    generated = generate(model, params, prompts, max_new_tokens=NEW, **options)
    check(generated, slow)
    assert generated.reasons == ("length",) * 3 and generated.lengths.tolist() == [NEW] * 3
    assert max(len(set(row)) for row, _ in slow) > 4, "the texts repeat one token: the test shows little"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_stand_on_either_side(case, side):
    model, params, prompts, slow, options = case
    width = 22
    tokens, segments = np.full((3, width), 77), np.zeros((3, width), int)
    for row, prompt in enumerate(prompts):
        own = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        tokens[row, own], segments[row, own] = prompt, 1
    check(generate(model, params, tokens, segments=segments, max_new_tokens=NEW, **options), slow)


def test_longer_prompts_of_the_decoder_of_an_encoder_decoder():
    model, params = tiny.build(tiny.CONFIGS["encoder-decoder"])
    prompts = tiny.ragged(5, 9)
    starts = [[1, 4, 8], [1]]
    together = generate(model, params, prompts, decoder_tokens=starts, max_new_tokens=10)
    for row, (prompt, start) in enumerate(zip(prompts, starts)):
        slow, _ = oracle.slow_greedy(model, params, prompt, 10, start)
        assert together.tokens[row].tolist() == slow


def test_scanned_models_are_unrolled():
    model, params = tiny.build(tiny.CONFIGS["rotary"])
    scanned = Transformer(replace(model.config, scan=True))
    prompts = tiny.ragged(4, 7)
    expected = generate(model, params, prompts, max_new_tokens=8)
    got = generate(scanned, stack_layers(params), prompts, max_new_tokens=8)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert unrolled(model, params) == (model, params)
    flat_model, flat = unrolled(scanned, stack_layers(params))
    assert flat_model == model
    jax.tree.map(np.testing.assert_array_equal, dict(flat), dict(params))


def test_token_types_positions_and_masks_reach_the_model():
    """Prompts that see each other in both directions, with types and positions of their own."""
    config = replace(tiny.CONFIGS["learned"], token_types=3)
    model, params = tiny.build(config)
    prompts, types = tiny.ragged(4, 7), [[0, 1, 1, 2], [2, 0, 0, 0, 1, 0, 1]]
    own = [[3, 5, 6, 9], [0, 1, 2, 10, 11, 12, 13]]
    padded = np.zeros((2, 2, 7), int)
    segments, tokens = np.zeros((2, 7), int), np.zeros((2, 7), int)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
        padded[0, row, : len(prompt)], padded[1, row, : len(prompt)] = types[row], own[row]
    inputs = {"token_types": padded[0], "positions": padded[1], "mask": Full()}
    got = generate(model, params, tokens, segments=segments, inputs=inputs, max_new_tokens=6)
    forward = jax.jit(model.apply)
    for row, prompt in enumerate(prompts):
        text, length = np.zeros((3, 1, 14), np.int32), len(prompt)
        text[:, 0, :length] = prompt, types[row], own[row]
        for end in range(length, length + 6):
            rest = {"token_types": text[1], "positions": text[2], "mask": Prefix(jnp.asarray([length]))}
            logits = forward(params, text[0], **rest)[0, end - 1]
            text[:, 0, end] = int(logits.argmax()), text[1, 0, end - 1], text[2, 0, end - 1] + 1
        assert got.tokens[row].tolist() == text[0, 0, length : length + 6].tolist()


@dataclass(frozen=True)
class Silenced(Transformer):
    """The first layer's attention adds nothing."""

    def apply(self, params, *args, **kwargs):
        def silence(call, args, kwargs, context):
            inside = context.module.path[:2] == ("layers_0", "attention") and len(context.module.path) == 2
            out = call(*args, **kwargs)
            return out * 0 if inside and context.method_name == "__call__" else out

        with nn.intercept_methods(silence):
            return super().apply(params, *args, **kwargs)


def test_interceptors_act_from_within_the_model_only(small):
    """Around the call they would be compiled into a program that stays."""
    model, params = small
    prompts = tiny.ragged(4, 7)
    plain = generate(model, params, prompts, max_new_tokens=6).tokens.tolist()
    edited = Silenced(model.config)
    got = generate(edited, params, prompts, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        assert got.tokens[row].tolist() == oracle.slow_greedy(edited, params, prompt, 6)[0]
    assert got.tokens.tolist() != plain
    assert generate(model, params, prompts, max_new_tokens=6).tokens.tolist() == plain
    with (
        nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs)),
        pytest.raises(InputError, match="interceptor"),
    ):
        generate(model, params, prompts, max_new_tokens=6)


def test_a_mask_may_be_made_of_the_padded_segments():
    model, params = tiny.build(tiny.CONFIGS["rotary"])
    prompts, seen = tiny.ragged(4, 7), []

    def mask(segments):
        seen.append(segments.copy())
        return Prefix(jnp.full(len(segments), segments.shape[1], jnp.int32))

    got = generate(model, params, prompts, inputs={"mask": mask}, max_new_tokens=6)
    full = generate(model, params, prompts, inputs={"mask": Full()}, max_new_tokens=6)
    np.testing.assert_array_equal(got.tokens, full.tokens)
    assert seen[0].shape == (2, 16) and seen[0].sum(1).tolist() == [4, 7] and seen[0][:, -1].all()
    assert not np.array_equal(got.tokens, generate(model, params, prompts, max_new_tokens=6).tokens)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"max_new_tokens": 93}, "exceed the model's 96 positions; at most 92"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 4, "decoder_tokens": 1}, "is a decoder"),
        ({"max_new_tokens": 4, "inputs": {"colour": 1}}, "'colour'; valid: positions"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens=5"),
        ({"max_new_tokens": 4, "stop_tokens": [-3]}, "stop_tokens"),
        ({"max_new_tokens": 4, "segments": [[1, 1], [1]]}, "segments have rows of unequal lengths"),
        ({"max_new_tokens": 4, "stop_sequences": [[]]}, "empty"),
        ({"max_new_tokens": 4, "stop_sequences": "end", "text_of": str}, "it is a list of strings"),
        ({"max_new_tokens": 4, "stop_sequences": [1, 2]}, r"stop_sequences=\[1, 2\]; it is a list"),
        ({"max_new_tokens": 4, "stop_sequences": ["a"]}, "text_of"),
    ],
)
def test_what_cannot_be_generated_is_refused(options, problem):
    model, params = tiny.build(tiny.CONFIGS["learned"])
    with pytest.raises(InputError, match=problem):
        generate(model, params, [[1, 2, 3, 4]], **options)


def test_a_model_that_leaves_the_numbers_says_so(small):
    """float16 overflows in models trained in bfloat16; the largest of NaNs would be token 0."""
    model, params = small
    params = jax.tree.map(lambda x: x * jnp.nan, params)
    for options in ({"max_new_tokens": 1}, {"max_new_tokens": 20}):
        with pytest.raises(InputError, match="float16 may overflow"):
            generate(model, params, [[1, 2], [3]], **options)
        with pytest.raises(InputError, match="float16 may overflow"):
            list(stream(model, params, [1, 2], **options))
    with pytest.raises(InputError, match="float16 may overflow"):
        beam_search(model, params, [1, 2], max_new_tokens=3, beams=2)


def test_the_last_position_can_be_used():
    model, params = tiny.build(tiny.CONFIGS["learned"])
    assert generate(model, params, [[1, 2, 3, 4]], max_new_tokens=92).lengths.tolist() == [92]
    assert generate(model, params, [[1] * 95], max_new_tokens=1).lengths.tolist() == [1]


def test_models_that_cannot_generate_are_refused(small):
    model, params = small
    with pytest.raises(InputError, match="ClassifierHead"):
        generate(Transformer(model.config, ClassifierHead(2)), params, [[1]], max_new_tokens=1)
    with pytest.raises(InputError, match="SingleStack; generating needs a Transformer"):
        generate(model.module, params, [[1]], max_new_tokens=1)
    with pytest.raises(InputError, match="'encoder'"):
        generate(Transformer(replace(model.config, kind="encoder")), params, [[1]], max_new_tokens=1)
    with pytest.raises(InputError, match="the id 97; the model has the ids 0 to 96"):
        generate(model, params, [[3, 97]], max_new_tokens=1)
    pair, pair_params = tiny.build(tiny.CONFIGS["encoder-decoder"])
    with pytest.raises(InputError, match="needs decoder_tokens"):
        generate(pair, pair_params, [[3]], max_new_tokens=1)
