"""`load_pretrained`: a published checkpoint as one of our models and its parameters.

pretrained = load_pretrained("openai-community/gpt2")
logits = pretrained.model.apply(pretrained.params, tokens)      # [B, T, V]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ... import InputError
from ...parallel import Layout
from ..config import TransformerConfig
from ..costs import abstract_parameters
from ..heads import Head
from ..model import Params
from ..precision import Precision
from ..transformer import Transformer
from . import registry
from .assemble import place_leaf
from .family import Family
from .files import TensorFiles, listed, locate
from .mapping import place
from .match import Matched, match
from .prepared import Prepared, Rows
from .settings import GENERIC, Settings

OWN: Literal["own"] = "own"


@dataclass(frozen=True)
class Pretrained:
    """What `load_pretrained` returns.

    `settings` is config.json as it was; `left_out` names tensors of the file that the chosen head does not
    use, `initialised` paths of parameters that are new. Give `settings` to `save_pretrained`.
    """

    model: Transformer
    params: Params
    architecture: str
    settings: dict[str, Any]
    folder: Path
    left_out: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()

    @property
    def prepares(self) -> bool:
        """Whether its prompts are more than their ids, so that `prepare` is needed."""
        return registry.family(self.settings["model_type"]).prepare is not None

    def prepare(self, rows: Rows) -> Prepared | None:
        """Prompts with what the model has to know of them beside their ids; None where that is nothing.

        CPM-Ant's own prompt, ChatGLM's positions. Raises `InputError` for rows that are no prompts.
        """
        own = registry.family(self.settings["model_type"]).prepare
        return None if own is None else own(rows, self.model.config, self.settings)


def load_pretrained(
    path_or_name: str | Path,
    *,
    revision: str = "",
    head: Head | Literal["own"] | None = OWN,
    architecture: str = "",
    dtype: str = "float32",
    compute: str = "",
    scan: bool = False,
    vocab_multiple: int = 1,
    layout: Layout | None = None,
    rng: jax.Array | None = None,
    ignore: Collection[str] = (),
) -> Pretrained:
    """The model in a local folder, or under a name of the Hugging Face hub.

    Tensors are read one shard of one leaf at a time, straight to where they are to lie: in the host's memory
    are never more than the final arrays and one shard.

    revision        commit, tag or branch on the hub ("": the latest); a commit can be had again
    head            what the model is to end in; "own" is that of the file's architecture. Where another has
                    parameters that the file lacks, they are drawn from `rng`
    architecture    the class in `transformers`, where config.json's `architectures` is not what is wanted
    dtype           type of the parameters, whatever the file's
    compute         type of the arithmetic ("": as `dtype`)
    scan            one scanned layer with stacked parameters
    vocab_multiple  pads the vocabulary, so that it divides over a mesh; `save_pretrained` takes it off again
    layout          where the parameters lie (None: on the first device)
    ignore          keys of config.json to pass over although nobody here knows them

    Raises `InputError`, in one line, for whatever the files hold that cannot be used, and lists it.
    """
    files = TensorFiles.open(locate(path_or_name, revision))
    settings = Settings(files.settings, ignore, files.names)
    family = registry.family(settings.take("model_type"))
    name = architecture or _architecture(files.settings, family)
    settings.values["architectures"] = [name]  # T5's encoder alone has another configuration
    own, config = _understood(family, name, settings)
    precision = Precision(param=dtype, compute=compute or dtype)
    precision.require_available()
    config = replace(config, scan=scan, vocab_multiple=vocab_multiple, precision=precision)
    model = Transformer(config, own if head == OWN else head)
    abstract = abstract_parameters(model)
    matched = _match(files, family, model, own, flatten_dict(abstract, sep="/"))
    shardings = flatten_dict((layout or Layout.single()).parameters(abstract, model.axes), sep="/")
    params = _read(files, matched, flatten_dict(abstract, sep="/"), shardings)
    params |= _initialise(model, matched.initialised, shardings, rng)
    tree = unflatten_dict(params, sep="/")
    left, new = matched.left_out, matched.initialised
    return Pretrained(model, tree, name, files.settings, files.folder, left, new)


def _understood(family: Family, name: str, settings: Settings) -> tuple[Head | None, TransformerConfig]:
    """The head and the configuration; raises `InputError` for whatever of the settings cannot be used."""
    try:
        head, config = family.head(name, settings), family.read(settings)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        nulls = [key for key, value in settings.values.items() if value is None and key not in GENERIC]
        also = f"; null are {listed(nulls)}" if nulls else ""
        raise InputError(
            f"config.json of a {family.name} model has a value of the wrong kind: {error}{also}"
        ) from error
    settings.finish(family.name)
    return head, config


def _architecture(settings: Mapping[str, Any], family: Family) -> str:
    """The file's first architecture."""
    names = settings.get("architectures") or []
    if not isinstance(names, list):
        raise InputError(f"config.json has architectures={names!r}; a list of names is valid")
    if not names:
        valid = ", ".join(family.architectures)
        raise InputError(f"config.json names no architectures; give architecture=, one of {valid}")
    return names[0]


def _match(
    files: TensorFiles, family: Family, model: Transformer, own: Head | None, abstract: Mapping[str, Any]
) -> Matched:
    config = model.config
    leaves = place(family.entries(config, model.head), config)
    stray = [path for path in leaves if path not in abstract]
    assert not stray, f"entries of {family.name} name leaves that the model has not: {listed(stray)}"
    fixed = abstract
    if model.head != own:
        fixed = flatten_dict(abstract_parameters(Transformer(config, None)), sep="/")
    return match(files, family, leaves, family.entries(config, own), abstract, fixed)


def _read(
    files: TensorFiles, matched: Matched, abstract: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    read = matched.reader(files)
    return {
        path: place_leaf(pieces, abstract[path], shardings[path], read)
        for path, pieces in matched.leaves.items()
    }


def _initialise(
    model: Transformer, paths: tuple[str, ...], shardings: Mapping[str, Any], rng: jax.Array | None
) -> dict[str, jax.Array]:
    """New parameters; the rest of the initial tree is never computed, since nothing asks for it."""
    if not paths:
        return {}
    if rng is None:
        raise InputError(f"the head has parameters that the file lacks: {listed(list(paths))}; give rng=")
    return jax.jit(lambda key: _chosen(model, key, paths), out_shardings={p: shardings[p] for p in paths})(
        rng
    )


def _chosen(model: Transformer, key: jax.Array, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    extra = {"decoder_tokens": tokens} if model.config.kind == "encoder-decoder" else {}
    flat = flatten_dict(model.init(key, tokens, **extra), sep="/")
    return {path: flat[path] for path in paths}
