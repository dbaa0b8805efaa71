"""Single neurons: what they predict, what a model loses without them, and what tasks have in common.

    layers = Layers.of(site_shapes(model, params, tokens, names=["mlp/act"]))
    drops = ablate_each(model, params, tokens, name="layers_3/mlp/act", metric=loss)  # F runs, one program
    effects = attribute(model, params, clean, corrupted, names=["residual"], metric=loss)
    shares = direct_effects(model, params, tokens, names=["mlp/act"], metric=logit)  # of the logit, added up
    logits = logit_lens(model, params, tokens)  # [L, B, T, V]

Skill neurons (docs/neurons.md): `Predictivity` in two passes, `select`, `intervene` and `prune`.
"""

from .correlation import Correlation
from .interventions import ablate_each, fixed, for_each, intervene, noised, stacked, unchanged
from .layers import Layers
from .lens import attention_maps, logit_lens
from .patching import activation_gradients, attribute, patch_each
from .paths import direct_effects, patch_paths
from .perturbation import Interval, Perturbed, bootstrap
from .predictivity import Accuracy, Predictivity, Subtask, Top, one_against_rest
from .pruning import neuron_site, prune
from .reading import Positions, Spread, TokenMax, TokenMean, activations
from .selection import in_layers, over_trials, random_like, select
from .transfer import fit_probe

__all__ = [
    "Accuracy",
    "Correlation",
    "Interval",
    "Layers",
    "Perturbed",
    "Positions",
    "Predictivity",
    "Spread",
    "Subtask",
    "TokenMax",
    "TokenMean",
    "Top",
    "ablate_each",
    "activation_gradients",
    "activations",
    "attention_maps",
    "attribute",
    "bootstrap",
    "direct_effects",
    "fit_probe",
    "fixed",
    "for_each",
    "in_layers",
    "intervene",
    "logit_lens",
    "neuron_site",
    "noised",
    "one_against_rest",
    "over_trials",
    "patch_each",
    "patch_paths",
    "prune",
    "random_like",
    "select",
    "stacked",
    "unchanged",
]
