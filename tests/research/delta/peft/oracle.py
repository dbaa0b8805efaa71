"""PEFT as the oracle: the same base model, the same adapter, and what both make of them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from modicum.models.pretrained import Pretrained, load_pretrained  # noqa: E402
from modicum.research.delta import attach  # noqa: E402
from modicum.research.delta.peft import load_peft, save_peft  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LOGITS, STEPS, COUNT = 1e-5, 1e-4, 5
RATE, DECAY, EPSILON = 3e-3, 1e-2, 1e-8
VOCAB, LABELS, IGNORED = 61, 3, -100
DECODER = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made."""

    model: str
    config: str
    options: dict[str, Any]
    task: str


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, **DECODER},
        "CAUSAL_LM",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **DECODER,
        },
        "CAUSAL_LM",
    ),
    "bert": Family(
        "BertForSequenceClassification",
        "BertConfig",
        {
            "initializer_range": 0.3,
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 40,
            "num_labels": LABELS,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "SEQ_CLS",
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {
            "initializer_range": 0.3,
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "max_position_embeddings": 40,
            "num_labels": LABELS,
            "pad_token_id": 1,
        },
        "SEQ_CLS",
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 40,
            "init_std": 0.2,
            "pad_token_id": 1,
        },
        "CAUSAL_LM",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 10,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
        },
        "SEQ_2_SEQ_LM",
    ),
}


MAIN = ("gpt2", "llama", "bert", "t5")  # those that every method is tried on where it can be


@dataclass(frozen=True)
class Case:
    """A tiny base model in both libraries; `fresh()` makes another copy of theirs."""

    name: str
    folder: Path
    pretrained: Pretrained

    @property
    def family(self):
        return FAMILIES[self.name]

    def made(self, spec):
        """(tuned, variables) of a specification of ours, with random values."""
        tuned, tokens = attach(self.pretrained.model, spec), jnp.zeros((1, 2), jnp.int32)
        extra = {"decoder_tokens": tokens} if self.name == "t5" else {}
        return tuned, randomised(tuned.init(jax.random.key(0), self.pretrained.params, tokens, **extra))

    def fresh(self):
        kind = getattr(transformers, self.family.model)
        return kind.from_pretrained(self.folder, attn_implementation="eager").eval()

    def wrapped(self, config, seed=0):
        """Theirs with an adapter of random values."""
        torch.manual_seed(seed)
        model = peft.get_peft_model(self.fresh(), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise * (0.02 if "modules_to_save" in name else 0.2))
        return model

    def loaded(self, folder, trainable=False):
        """Theirs with the adapter in `folder`."""
        model = peft.PeftModel.from_pretrained(self.fresh(), folder, is_trainable=trainable)
        return model.eval()


def build(name, folder) -> Case:
    """Make the model, save it, load it here."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.options)
    model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:  # singular values with a gap after the 4th: else PiSSA of rank 4 is hardly determined
                left, values, right = torch.linalg.svd(parameter, full_matrices=False)
                values[4:] *= 0.5
                parameter.copy_(left @ torch.diag(values) @ right)
    model.save_pretrained(folder)
    return Case(name, folder, load_pretrained(folder))


def batch(name, seed=0, rows=2, length=9):
    """(inputs with the oracle's names, targets) of one step."""
    draw = np.random.default_rng(seed)
    ids, mask = draw.integers(3, VOCAB, (rows, length)), np.ones((rows, length), np.int64)
    mask[-1, -3:] = 0  # the last row ends in padding
    inputs = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[name].task == "SEQ_CLS":
        return inputs, draw.integers(0, LABELS, rows)
    if name == "t5":
        decoder = draw.integers(3, VOCAB, (rows, 6))
        return {**inputs, "decoder_input_ids": decoder}, draw.integers(3, VOCAB, (rows, 6))
    return inputs, np.where(mask > 0, draw.integers(3, VOCAB, (rows, length)), IGNORED)


def real(logits, inputs):
    """Logits without those of padding, as rows."""
    per_token = logits.ndim == 3 and "decoder_input_ids" not in inputs
    return logits[np.asarray(inputs["attention_mask"]) > 0] if per_token else logits


def their_logits(model, inputs):
    """Logits of the oracle for the real tokens (those of a prompt come first and are left away)."""
    logits = model(**{key: torch.as_tensor(value) for key, value in inputs.items()}).logits
    length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    return logits[:, -length:] if logits.ndim == 3 else logits


def our_logits(tuned, variables, params, inputs):
    """The same of ours."""
    extra = {"decoder_tokens": inputs["decoder_input_ids"]} if "decoder_input_ids" in inputs else {}
    segments = jnp.asarray(inputs["attention_mask"], jnp.int32)
    return tuned.apply(variables, params, jnp.asarray(inputs["input_ids"]), segments=segments, **extra)


def gap(found, expected):
    """Largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def expected_logits(case, model):
    """The oracle's logits on one batch."""
    inputs, _ = batch(case.name, seed=7)
    with torch.no_grad():
        return real(their_logits(model, inputs).numpy(), inputs)


def found_logits(case, tuned):
    """A compiled function of the variables: ours on the same batch."""
    inputs, _ = batch(case.name, seed=7)
    apply = jax.jit(lambda variables: our_logits(tuned, variables, case.pretrained.params, inputs))
    return lambda variables: real(apply(variables), inputs)


def train_theirs(case, model, penalty=None):
    """Five steps of AdamW on theirs, in place."""
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or "base_model" in name or "word_embeddings" in name
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert own
    optimizer = torch.optim.AdamW(own, lr=RATE, eps=EPSILON, weight_decay=DECAY)
    for step in range(COUNT):
        inputs, targets = batch(case.name, seed=100 + step)
        logits = their_logits(model, inputs)
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.as_tensor(targets).reshape(-1)
        )
        loss = loss + penalty(model) if penalty else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def train_ours(case, tuned, variables):
    """The same of ours."""
    optimizer = optax.adamw(RATE, eps=EPSILON, weight_decay=DECAY)

    def loss(delta, state, inputs, targets):
        logits = our_logits(tuned, {"delta": delta, "delta_state": state}, case.pretrained.params, inputs)
        counted = targets != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0))
        return losses.mean(where=counted) + tuned.penalty({"delta": delta, "delta_state": state})

    @jax.jit
    def step(delta, moments, inputs, targets):
        grads = jax.grad(loss)(delta, variables["delta_state"], inputs, targets)
        updates, moments = optimizer.update(grads, moments, delta)
        return optax.apply_updates(delta, updates), moments

    delta, moments = variables["delta"], optimizer.init(variables["delta"])
    for index in range(COUNT):
        delta, moments = step(delta, moments, *batch(case.name, seed=100 + index))
    return {"delta": delta, "delta_state": variables["delta_state"]}


def tensors_of(folder):
    """Name to (type, bytes) of an adapter's tensors."""
    from safetensors.numpy import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in found.items()}


def same_bits(first, second):
    """Two delta trees are equal, bit by bit."""
    first, second = (_unnumbered(tree) for tree in (first, second))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert one.dtype == two.dtype and np.asarray(one).tobytes() == np.asarray(two).tobytes()


def _unnumbered(tree):
    """Without the numbers of methods' names: a module has one delta."""
    if not isinstance(tree, dict):
        return tree
    return {name.split("_")[0] if name[0] == "~" else name: _unnumbered(tree[name]) for name in tree}


def exchange(case, method, config, tmp_path, *, train=True, penalty=None, exact=True):
    """All of it for an adapter made in PEFT; returns what was loaded here."""
    model = config if isinstance(config, torch.nn.Module) else case.wrapped(config)
    model.save_pretrained(tmp_path / "theirs")
    tuned, variables = load_peft(tmp_path / "theirs", case.pretrained)
    logits = found_logits(case, tuned)
    figures = {"from": gap(logits(variables), expected_logits(case, model))}
    save_peft(tmp_path / "ours", tuned, variables, case.pretrained)
    if exact:
        assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    figures["to"] = gap(logits(variables), expected_logits(case, case.loaded(tmp_path / "ours")))
    if train:
        train_theirs(case, model, penalty)
        trained = train_ours(case, tuned, variables)
        model.save_pretrained(tmp_path / "trained")
        _, expected = load_peft(tmp_path / "trained", case.pretrained)
        figures["steps"] = gap(logits(trained), expected_logits(case, model))
        figures["values"] = tree_gap(trained["delta"], expected["delta"])
        assert tree_gap(variables["delta"], expected["delta"]) > 10 * STEPS
    report(case, method, figures)
    assert figures["from"] <= LOGITS and figures["to"] <= LOGITS, figures
    assert max(figures.get("steps", 0), figures.get("values", 0)) <= STEPS, figures
    return tuned, variables


def tree_gap(found, expected):
    """The largest difference of two delta trees, each array relative to its largest value."""
    gaps = jax.tree.map(gap, found, expected)
    return max(jax.tree.leaves(gaps))


def made_here(case, method, tuned, variables, tmp_path, *, again=True):
    """A delta of ours, saved: PEFT computes the same, and loaded here it is the same."""
    save_peft(tmp_path / "ours", tuned, variables, case.pretrained)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    trainable = "target_modules" in config  # PEFT loads no prompt to be trained on
    model = case.loaded(tmp_path / "ours", trainable=trainable)
    assert not trainable or any(parameter.requires_grad for parameter in model.parameters())
    expected = expected_logits(case, model)
    figure = gap(found_logits(case, tuned)(variables), expected)
    report(case, method, {"to": figure})
    assert figure <= LOGITS
    retuned, found = load_peft(tmp_path / "ours", case.pretrained)
    if again:
        same_bits(found["delta"], variables["delta"])
    else:
        assert gap(found_logits(case, retuned)(found), expected) <= LOGITS
    return config


def randomised(variables, scale=0.2, seed=3):
    """Trained variables with random values added."""
    leaves, structure = jax.tree.flatten(variables["delta"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return {"delta": jax.tree.unflatten(structure, moved), "delta_state": variables["delta_state"]}


def report(case, method, figures):
    """One line of figures."""
    text = " ".join(f"{name}={value:.1e}" for name, value in figures.items())
    report_line(f"peft {method} {case.name} {text}")


def report_line(line):
    """Append it to the file that MODICUM_PARITY names, if any."""
    if path := os.environ.get("MODICUM_PARITY"):
        with open(path, "a") as file:
            file.write(line + "\n")
