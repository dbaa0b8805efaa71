"""Text from a tuned model without merging: a Transformer whose parameters hold the delta beside the backbone.

model, params = as_transformer(tuned, variables, backbone)
generate(model, params, prompt, max_new_tokens=20)
generate(model, {**params, **another_task}, prompt, max_new_tokens=20)        # the same compiled programs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ... import InputError
from ...models.model import Params
from ...models.stacking import unstack_layers
from ...models.transformer import Transformer
from .attach import Tuned
from .stacking import unstack_delta


@dataclass(frozen=True)
class TunedTransformer(Transformer):
    """A tuned Transformer as a Transformer: its parameters are `{"params", "delta", "delta_state"}`."""

    tuned: Tuned = field(kw_only=True)

    def init(self, rng: Any, *args: Any, **kwargs: Any) -> Params:
        """Not defined: a tuned model starts from a backbone's parameters."""
        raise InputError("a tuned Transformer has no init of its own; tuned.init makes its variables")

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """What the tuned model computes; arguments and results as those of `Transformer.apply`."""
        variables = {part: params[part] for part in ("delta", "delta_state") if part in params}
        return self.tuned.apply(variables, params["params"], *args, **kwargs)


def as_transformer(
    tuned: Tuned, variables: Mapping[str, Any], params: Params
) -> tuple[TunedTransformer, dict[str, Any]]:
    """A Transformer and its parameters for `generate`, `stream` and `beam_search`; scanned layers unrolled.

    Call it once for a task: of a scanned model the layers are copied. Raises `InputError` for a model that is
    no Transformer.
    """
    if not isinstance(tuned.model, Transformer):
        raise InputError(f"{type(tuned.model).__name__} is no Transformer: generating needs one")
    if tuned.model.config.scan:
        period = tuned.model.config.period
        tuned, variables = unstack_delta(tuned, variables, params)
        params = unstack_layers(params, period)
    model = tuned.model
    assert isinstance(model, Transformer)
    whole = {"params": params, "delta": variables["delta"], "delta_state": variables.get("delta_state", {})}
    return TunedTransformer(model.config, model.head, tuned=tuned), whole
