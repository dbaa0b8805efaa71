"""`transformers` as the oracle: the same files, the same inputs, and what both make of them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from modicum.models import run_with_cache  # noqa: E402
from modicum.models.pretrained import Pretrained, load_pretrained, save_pretrained  # noqa: E402
from modicum.models.pretrained.alike import described  # noqa: E402
from modicum.models.pretrained.assemble import their_tensors  # noqa: E402
from modicum.models.pretrained.files import TensorFiles  # noqa: E402
from modicum.models.pretrained.mapping import place  # noqa: E402
from modicum.models.pretrained.registry import family  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4  # of the logits' scale: their largest absolute value
INPUTS = {
    "input_ids": "tokens",
    "attention_mask": "segments",
    "position_ids": "positions",
    "token_type_ids": "token_types",
    "decoder_input_ids": "decoder_tokens",
    "decoder_attention_mask": "decoder_segments",
}


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences from the oracle, and the logits' largest absolute value."""

    logits: float
    hidden: float
    scale: float
    pretrained: Pretrained


def perturbed(model, seed=0):
    """The model with normal noise of 0.1 on every vector (biases, norms), so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(vocab, batch=2, length=12, seed=0):
    """Random token numbers `[B, T]`."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length))


def theirs(model, inputs):
    """(logits, pooled or last hidden states, hidden states) of the oracle, as numpy arrays.

    Hidden states are by our hook's name, without the last layer's before a final norm.
    """
    with torch.no_grad():
        out = model(**{k: torch.as_tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    first = next(out[key] for key in ("logits", "pooler_output", "last_hidden_state") if key in out)
    stacks = {"": "hidden_states", "encoder/": "encoder_hidden_states", "decoder/": "decoder_hidden_states"}
    hidden = {}
    for prefix, key in stacks.items():
        states = [state.numpy() for state in (out.get(key) or ())]
        for index, state in enumerate(states):
            last = index == len(states) - 1
            name = "embedded" if index == 0 else f"layers_{index - 1}/residual"
            hidden[prefix + ("final_norm" if last else name)] = state
    return first.numpy(), hidden


def ours(pretrained, inputs):
    """The same of our model, unrolled; `final_norm` is the last layer's output where there is no norm."""
    values = {INPUTS.get(key, key): np.asarray(value) for key, value in inputs.items()}
    given = values.pop("tokens")
    config = pretrained.model.config
    names = ["embedded", r"layers_\d+/residual"] + (["final_norm"] if config.residual.final_norm else [])
    run = jax.jit(lambda params: run_with_cache(pretrained.model, params, given, names=names, **values))
    logits, hidden = run(pretrained.params)
    for prefix in {name.rpartition("embedded")[0] for name in hidden if name.endswith("embedded")}:
        depth = config.depth_of_decoder if prefix == "decoder/" else config.layers
        hidden.setdefault(f"{prefix}final_norm", hidden.get(f"{prefix}layers_{depth - 1}/residual"))
    return np.asarray(logits), {name: np.asarray(state) for name, state in hidden.items()}


def compare(tmp_path, model, inputs, *, settings=None, **options) -> Parity:
    """Save the oracle's model, load it here, and check outputs, hidden states, and the way back.

    `inputs` have the oracle's names; where a mask is 0 nothing is compared. `settings` are changed in the
    saved config.json (None takes a key out); `options` go to `load_pretrained`.
    """
    model.save_pretrained(tmp_path / "theirs")
    change_settings(tmp_path / "theirs", settings or {})
    pretrained = load_pretrained(tmp_path / "theirs", **options)
    expected, expected_hidden = theirs(model, inputs)
    found, hidden = ours(pretrained, inputs)
    scale = float(np.abs(expected).max())
    if pretrained.model.config.embedding_width:  # theirs is the last projection's output, in ours the head's
        expected_hidden.pop("final_norm")
    worst = {name: difference(hidden[name], state, inputs, name) for name, state in expected_hidden.items()}
    parity = Parity(difference(found, expected, inputs), max(worst.values(), default=0.0), scale, pretrained)
    report(model, parity)
    assert parity.logits <= TOLERANCE * scale
    assert all(value <= TOLERANCE * scale for value in worst.values()), worst
    check_the_way_back(tmp_path, pretrained, model, inputs, expected)
    return parity


def difference(found, expected, inputs, name=""):
    """The largest absolute difference, where the tokens are no padding."""
    decoder = "decoder_input_ids" in inputs and not name.startswith("encoder/")
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    gap = np.abs(found - expected)
    assert np.isfinite(found).all()
    return float((gap if mask is None or gap.ndim < 3 else gap[np.asarray(mask) > 0]).max())


def check_the_way_back(tmp_path, pretrained, model, inputs, expected):
    """Saved and loaded, parameters are the same bits; the oracle computes the same bits from our files."""
    save_pretrained(tmp_path / "back", pretrained.model, pretrained.params, settings=pretrained.settings)
    again = load_pretrained(tmp_path / "back")
    assert described(again.model.config) == described(pretrained.model.config)
    assert again.model.head == pretrained.model.head and again.architecture == pretrained.architecture
    assert_same_bits(again.params, pretrained.params)
    before, after = TensorFiles.open(tmp_path / "theirs"), TensorFiles.open(tmp_path / "back")
    assert set(after.names) <= set(before.names)
    for name in after.names:
        assert before.dtype(name) == after.dtype(name)
        assert before.read(name).tobytes() == after.read(name).tobytes(), name
    assert (oracle_on(tmp_path / "back", model, inputs) == expected).all()
    # The same without the settings that came along: config.json has what the family writes, and no more.
    save_pretrained(tmp_path / "anew", pretrained.model, pretrained.params, architecture=type(model).__name__)
    assert described(load_pretrained(tmp_path / "anew").model.config) == described(pretrained.model.config)
    gap = np.abs(oracle_on(tmp_path / "anew", model, inputs) - expected).max()
    assert gap <= 1e-6 * np.abs(expected).max(), gap


def compare_gradients(tmp_path, model, ids) -> float:
    """The language-model loss's gradients, ours mapped through the entries of the parameters, and PyTorch's.

    Returns the largest difference, of the largest gradient of the same tensor.
    """
    model.save_pretrained(tmp_path)
    given = torch.as_tensor(ids)
    model(given, labels=given).loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    pretrained = load_pretrained(tmp_path)

    def loss(params):
        log = jax.nn.log_softmax(pretrained.model.apply(params, ids)[:, :-1])
        return -jax.numpy.take_along_axis(log, ids[:, 1:, None], -1).mean()

    grads = jax.jit(jax.grad(loss))(pretrained.params)
    entries = family(pretrained.settings["model_type"]).entries(
        pretrained.model.config, pretrained.model.head
    )
    found = {t.name: t.make() for t in their_tensors(place(entries, pretrained.model.config), grads)}
    assert found.keys() == expected.keys()
    return max(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max() for name in found)


def oracle_on(folder, model, inputs):
    """What the oracle's class computes from the files in `folder`, which must fit it."""
    options = {"attn_implementation": model.config._attn_implementation, "output_loading_info": True}
    reloaded, found = type(model).from_pretrained(folder, **options)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return theirs(reloaded.eval(), inputs)[0]


def assert_same_bits(first, second):
    """Two trees of arrays are equal, bit by bit."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert one.dtype == two.dtype and np.asarray(one).tobytes() == np.asarray(two).tobytes()


def change_settings(folder, changes):
    """Change keys of the config.json in `folder`; None takes one out."""
    path = Path(folder) / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def report(model, parity):
    """Append a line to the file that MODICUM_PARITY names, if any."""
    if path := os.environ.get("MODICUM_PARITY"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0]
        with open(path, "a") as file:
            errors = f"{parity.logits / parity.scale:.1e} {parity.hidden / parity.scale:.1e}"
            file.write(f"{model.config.model_type} {type(model).__name__} {test} {errors}\n")
