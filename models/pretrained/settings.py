"""`config.json` as a form that is read to its last line: a key that nobody understands is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ... import InputError

# Keys of every configuration of `transformers` (4 and 5) that change no output: bookkeeping, what tokenizers
# and generation need, labels. `save_pretrained` hands them through.
GENERIC = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "transformers.js_config",
        "typical_p",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "_num_labels",
    ]
)
# Keys of every configuration that do change outputs, and the one value at which they do not. A family that
# knows another value reads the key itself.
NEUTRAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "encoder_repetition_penalty": 1.0,
    "is_decoder": False,
    "per_layer_config": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}
NUMBERS = (int, float)


class Settings:
    """The values of a `config.json`, each of which has to be read, or ignored by name, by a family.

    `take` and `require` note what was read and `refuse` what cannot be had; `finish` raises one `InputError`
    that lists all of it. `ignore` are keys that the user passes over;
    `tensors` names what the files hold, None where there are no files: some configurations do not say whether
    a model has a matrix of its own for the logits.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        ignore: Collection[str] = (),
        tensors: Collection[str] | None = None,
    ) -> None:
        self.values = dict(values)
        self.tensors = None if tensors is None else frozenset(tensors)
        self._read = set(ignore)
        self._problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, *default: Any) -> Any:
        """The value of `key`, or the default where it is absent (a null in the file is None).

        Without a default the key must be there; a value of another type than the default's is refused.
        """
        self._read.add(key)
        if key not in self.values:
            if not default:
                raise InputError(f"config.json has no {key!r}, which this model needs")
            return default[0]
        value = self.values[key]
        if default and not _alike(value, default[0]):
            kind = type(default[0]).__name__
            raise InputError(f"config.json has {key}={value!r}; a value of type {kind} is valid")
        if not default or not isinstance(default[0], int) or isinstance(value, bool | None):
            return value
        if value < 0:
            raise InputError(f"config.json has {key}={value}; at least 0 is valid")
        return int(value)

    def require(self, key: str, *allowed: Any) -> Any:
        """The value of `key`, which must be one of `allowed`; the first of these where it is absent."""
        value = self.take(key, None) if key in self.values else allowed[0]
        if value not in allowed:
            self.refuse(f"{key}={value!r} (valid: {', '.join(repr(v) for v in allowed)})")
            return allowed[0]
        return value

    def ignore(self, *keys: str) -> None:
        """These keys change nothing that is computed here."""
        self._read.update(keys)

    def refuse(self, problem: str) -> None:
        """Note an option that cannot be had, as `key=value (valid: ...)`."""
        self._problems.append(problem)

    def finish(self, family: str) -> None:
        """Raise `InputError` that lists every refused option and every key that nobody has read."""
        unread = {key: value for key, value in self.values.items() if key not in self._read | GENERIC}
        for key, value in unread.items():
            if key not in NEUTRAL:
                self.refuse(f"{key}={value!r} (unknown key; ignore=({key!r},) passes over it)")
            elif value != NEUTRAL[key] and value:
                self.refuse(f"{key}={value!r} (valid: {NEUTRAL[key]!r})")
        if self._problems:
            raise InputError(
                f"config.json of a {family} model has unsupported options: {'; '.join(self._problems)}"
            )


def _alike(value: Any, default: Any) -> bool:
    """Whether the value's type is the default's, whole numbers passing as fractions."""
    if value is None or default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, NUMBERS):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole if isinstance(default, int) else isinstance(value, NUMBERS)
    return isinstance(value, type(default))
