"""`save_peft`: a tuned model's delta as an adapter that `PeftModel.from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .... import InputError
from ....models.heads import ClassifierHead, LanguageModelHead
from ....models.pretrained import Pretrained
from ....models.pretrained.registry import family
from ..attach import Tuned
from ..leaves import apply_leaf
from ..methods import LeafMethod, SiteMethod
from ..trees import variables_by_place
from .config import written
from .files import PREFIX, ROOT, write_adapter
from .kinds import CODECS, Codec, codec_for
from .modules import Base, base_of
from .places import taken
from .whole import write_whole

CLASSIFIER = "classifier"  # what PEFT calls it, in every family here


def save_peft(
    folder: str | Path,
    tuned: Tuned,
    variables: Mapping[str, Any],
    pretrained: Pretrained,
    *,
    base: str = "",
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors to `folder` and return it.

    `pretrained` is the model that the delta belongs to, `base` what the file calls it (a name of the hub; by
    default the folder it was loaded from). Arrays trained in full are stored with their whole modules
    (`modules_to_save`), and a trained classifier makes it an adapter for sequence classification. Raises
    `InputError` for whatever PEFT cannot express, and says why.
    """
    known = base_of(
        family(pretrained.settings["model_type"]),
        pretrained.architecture,
        pretrained.model,
        pretrained.params,
    )
    codec = _codec(tuned)
    deltas = taken(tuned, variables, known, lambda method: isinstance(method, SiteMethod))
    keys, tensors = codec.write(deltas, known)
    changed, params = _whole(tuned, variables, known)
    wrapped = "target_modules" in keys  # in PEFT; a prompt's model is not
    task = _task(known, changed, wrapped)
    if task == "SEQ_CLS":  # PEFT then always wants all of what it calls the classifier
        groups = (known.entries[name] for name in known.entries if name.startswith(f"{CLASSIFIER}."))
        changed |= {entry.ours for group in groups for entry in group}
    modules, whole = write_whole(sorted(changed), params, known)
    if task == "SEQ_CLS":  # RoBERTa's is several modules, which PEFT takes as one
        modules = sorted(
            {CLASSIFIER if f"{name}.".startswith(f"{CLASSIFIER}.") else name for name in modules}
        )
    if twice := sorted(set(modules) & set(keys.get("target_modules", ()))):
        raise InputError(
            f"{twice[0]}: a delta and arrays trained in full in one module; PEFT has one of them"
        )
    keys |= {"modules_to_save": modules} if modules else {}
    text = written(codec.kind, task, base or str(pretrained.folder), keys)
    prefix = PREFIX if wrapped else ROOT
    named = {prefix + name: tensor for name, tensor in whole.items()}
    return write_adapter(Path(folder), text, {**tensors, **named})


def _codec(tuned: Tuned) -> Codec:
    """The one that stores all site methods; raises `InputError` where there is none or are several."""
    codecs = {}
    for entry in tuned.entries:
        if isinstance(entry.method, SiteMethod):
            codec = codec_for(entry.method)
            if codec is None:
                valid = ", ".join(kind.name for each in CODECS for kind in each.methods)
                raise InputError(f"PEFT has no {entry.method.name}; valid: {valid}")
            codecs[codec.kind] = codec
    if not codecs:
        raise InputError("a PEFT adapter needs a delta at a module; whole arrays are saved beside one")
    if len(codecs) > 1:
        raise InputError(f"a PEFT adapter is of one kind, this delta of {', '.join(codecs)}; save them apart")
    return next(iter(codecs.values()))


def _whole(tuned: Tuned, variables: Mapping[str, Any], base: Base) -> tuple[set[str], Mapping[str, Any]]:
    """The paths of arrays that leaf methods change, and the parameters with the change."""
    own, params = variables_by_place(variables), base.params
    paths = set()
    for (path, entry), hit in tuned.hits(variables, base.params).items():
        if isinstance(entry.method, LeafMethod):
            params = apply_leaf(entry.method, own[path, entry.name], params, path, hit)
            paths.add(path)
    return paths, params


def _task(base: Base, changed: set[str], wrapped: bool) -> str | None:
    """What PEFT takes the model for: it decides where prompts go, and a classifier is saved with them."""
    head, kind = base.model.head, base.model.config.kind
    if isinstance(head, ClassifierHead):
        trained = any(path.startswith("classifier/") for path in changed)
        return "SEQ_CLS" if trained or not wrapped else None
    if isinstance(head, LanguageModelHead):
        return "SEQ_2_SEQ_LM" if kind == "encoder-decoder" else "CAUSAL_LM"
    if head is not None and not wrapped:
        raise InputError(f"PEFT has no prompts for {base.architecture}")
    return "FEATURE_EXTRACTION" if head is None else None
