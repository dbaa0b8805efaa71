"""What is computed: Transformers as pure functions over parameter trees.

* `model` the protocol; `transformer` the three assemblies; `config` and `presets` what to assemble
* `block`, `attention`, `mlp`, `norms`, `positions`, `residuals`, `heads` the parts
* `kernels` the attention function behind one front
* `hooks` reading and editing activations; `axes` logical axis names; `stacking` scanned layers
* `losses`, `costs`, `precision`
"""

from .attention import GroupedQuery, multi_head, multi_query
from .block import Block, Context
from .config import Layer, TransformerConfig
from .heads import ClassifierHead, LanguageModelHead
from .hooks import Hook, run_with_cache, run_with_edits
from .mlp import MLP, GatedMLP
from .model import LinenModel, Model, Params, as_linen, as_model
from .norms import LayerNorm, RMSNorm
from .positions import ALiBi, Learned, Positions, RelativeBuckets, Rotary, Sinusoidal
from .precision import BF16, FP16, FP32, FP64, Precision
from .presets import PRESETS, preset
from .residuals import PostNorm, PreNorm
from .stacking import stack_layers, unstack_layers
from .transformer import Transformer

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "FP64",
    "MLP",
    "PRESETS",
    "ALiBi",
    "Block",
    "ClassifierHead",
    "Context",
    "GatedMLP",
    "GroupedQuery",
    "Hook",
    "LanguageModelHead",
    "Layer",
    "LayerNorm",
    "Learned",
    "LinenModel",
    "Model",
    "Params",
    "Positions",
    "PostNorm",
    "PreNorm",
    "Precision",
    "RMSNorm",
    "RelativeBuckets",
    "Rotary",
    "Sinusoidal",
    "Transformer",
    "TransformerConfig",
    "as_linen",
    "as_model",
    "multi_head",
    "multi_query",
    "preset",
    "run_with_cache",
    "run_with_edits",
    "stack_layers",
    "unstack_layers",
]
