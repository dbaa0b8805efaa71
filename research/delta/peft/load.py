"""`load_peft`: an adapter made by Hugging Face PEFT as a tuned model and its variables."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .... import InputError
from ....models.pretrained import Pretrained
from ....models.pretrained.files import listed, locate
from ....models.pretrained.registry import family
from ..attach import Tuned, attach
from ..full import Full
from ..methods import Method
from ..trees import node_at
from .config import CONFIG, Config
from .files import PREFIX, ROOT, TENSORS, Tensors, read_tensors
from .kinds import codec_of
from .modules import Base, base_of
from .places import filled, specification
from .prefix import PROMPT
from .vera import A, B
from .whole import read_whole

OF_NO_MODULE = (PROMPT, A, B)
COPY = ".base_layer."  # PEFT stores the weights of an adapted output layer too


def load_peft(
    folder: str | Path,
    pretrained: Pretrained,
    *,
    revision: str = "",
    rng: jax.Array | None = None,
    ignore: Collection[str] = (),
) -> tuple[Tuned, dict[str, Any]]:
    """The tuned model and the variables of a PEFT adapter, in a folder or of a name on the Hugging Face hub.

    `pretrained` is the model that it was made for, `revision` a commit, tag or branch on the hub.
    `rng` is for what files do not hold (dropout's seeds); `ignore` names keys of adapter_config.json to pass
    over although nobody here knows them. Modules trained in full (`modules_to_save`) become `Full`. Raises
    `InputError`, in one line, for a file that is absent or damaged, for a variant that is not supported and
    for tensors that the model has no place for. The adapter does not say which weights it belongs to: that
    they are these, nobody checks.
    """
    folder = locate(folder, revision, (CONFIG, TENSORS))
    config = Config.open(folder)
    config.ignore(*ignore)
    codec = codec_of(config)
    base = base_of(
        family(pretrained.settings["model_type"]),
        pretrained.architecture,
        pretrained.model,
        pretrained.params,
    )
    tensors = read_tensors(folder)
    copies = {name: tensors.pop(name) for name in list(tensors) if COPY in name}
    found, saved = _sorted(tensors, codec.suffixes, base)
    _check_copies(copies, base)
    deltas = codec.read(config, found, base)
    config.finish()
    leaves = read_whole(saved, base)
    methods: dict[str, Method] = {path: delta.method for path, delta in deltas.items()}
    spec = specification(methods) | {path: [Full()] for path in leaves}
    tuned = attach(pretrained.model, spec)
    key = jax.random.key(0) if rng is None else rng
    tokens = jnp.zeros((1, 2), jnp.int32)
    extra = {"decoder_tokens": tokens} if pretrained.model.config.kind == "encoder-decoder" else {}
    variables = tuned.init(key, pretrained.params, tokens, **extra)
    return tuned, filled(variables, tuned, base, deltas, leaves)


def _check_copies(copies: Tensors, base: Base) -> None:
    """Raise `InputError` unless these weights, stored beside a delta of the logits, are the base model's."""
    _, saved = _sorted({name.replace(COPY, "."): tensor for name, tensor in copies.items()}, (), base)
    for path, leaf in read_whole(saved, base).items():
        if not np.array_equal(leaf, np.asarray(node_at(base.params, path)).astype(leaf.dtype)):
            raise InputError(
                f"the adapter holds other weights for {path} than the base model: {next(iter(copies))}"
            )


def _sorted(
    tensors: Tensors, suffixes: tuple[str, ...], base: Base
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """(tensors of each module by their ends, whole tensors of the base model by name)."""
    found: dict[str, Tensors] = {}
    saved: Tensors = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        own = next((name.removeprefix(prefix) for prefix in (PREFIX, ROOT) if name.startswith(prefix)), name)
        suffix = next((each for each in suffixes if own == each or own.endswith(f".{each}")), None)
        if own == suffix and suffix in OF_NO_MODULE:
            found.setdefault("", {})[own] = tensor
        elif suffix is None:
            whole = base.named(own, base.entries)
            strange += [own] if whole not in base.entries else []
            saved[whole] = tensor
        else:
            module = base.named(own.removesuffix(f".{suffix}"), base.modules)
            strange += [own] if module not in base.modules else []
            found.setdefault(module, {})[suffix] = tensor
    if inside := [name for name in found if name in base.mixed]:
        raise InputError(
            f"the adapter has a delta at {inside[0]}, whose product is inside our {base.mixed[inside[0]]}: "
            f"that pools, activates or scales too, so no delta can act at the product alone"
        )
    if strange:
        raise InputError(
            f"the adapter has tensors that {base.architecture} has no place for: {listed(strange)}; "
            f"its modules are {listed(list(base.modules))}"
        )
    return found, saved
