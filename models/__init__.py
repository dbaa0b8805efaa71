"""What is computed: Transformers as pure functions over parameter trees.

* `model` the protocol; `transformer` the three assemblies; `config` and `presets` what to assemble
* `block`, `attention`, `mlp`, `norms`, `residuals`, `heads` the parts; `sparse_activations` for `mlp`,
  `activations` as one writes them;
  `experts` a routed feed-forward layer (`routing`, `dispatch`, `grouped`); `moefied` and `selection`
  feed-forward layers of which a token uses some experts; `embedding` and `place` what the layers are given;
  `cache` keys and values of the tokens so far
* `positions`, `rotary`; `relations`, `rotary2d` and `extended` are CPM's and ChatGLM's
* `kernels` the attention function behind one front
* `hooks` reading and editing activations; `axes` logical axis names; `stacking` scanned layers
* `losses`, `costs`, `precision`, `tables`
"""

from .attention import GroupedQuery, multi_head, multi_query
from .block import Block, Context
from .cache import Cache
from .config import Layer, TransformerConfig
from .experts import RoutedMLP
from .extended import ExtendedHead, ExtraWords
from .heads import ClassifierHead, LanguageModelHead, MaskedLanguageModelHead, Pooler
from .hooks import Hook, run_with_cache, run_with_edits
from .mlp import MLP, GatedMLP
from .model import LinenModel, Model, Params, as_linen, as_model
from .moefied import MoefiedMLP
from .norms import LayerNorm, RMSNorm
from .positions import ALiBi, Learned, Positions, RelativeBuckets, Rotary, Sinusoidal
from .precision import BF16, FP16, FP32, FP64, Precision
from .presets import PRESETS, preset
from .relations import SegmentPositions, SegmentRelations, TreePositions, TreeRelations
from .residuals import NormedResidual, PostNorm, PreNorm
from .rotary import DynamicScaling, LinearScaling, Llama3Scaling, RotaryScaling, YarnScaling
from .rotary2d import Rotary2D
from .selection import CentreSelection, LowRankSelection, MLPSelection, OracleSelection
from .sparse_activations import FATReLU, StatisticalTopK, TopK
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
    "Cache",
    "CentreSelection",
    "ClassifierHead",
    "Context",
    "DynamicScaling",
    "ExtendedHead",
    "ExtraWords",
    "FATReLU",
    "GatedMLP",
    "GroupedQuery",
    "Hook",
    "LanguageModelHead",
    "Layer",
    "LayerNorm",
    "Learned",
    "LinearScaling",
    "LinenModel",
    "Llama3Scaling",
    "LowRankSelection",
    "MLPSelection",
    "MaskedLanguageModelHead",
    "Model",
    "MoefiedMLP",
    "NormedResidual",
    "OracleSelection",
    "Params",
    "Pooler",
    "Positions",
    "PostNorm",
    "PreNorm",
    "Precision",
    "RMSNorm",
    "RelativeBuckets",
    "Rotary",
    "Rotary2D",
    "RotaryScaling",
    "RoutedMLP",
    "SegmentPositions",
    "SegmentRelations",
    "Sinusoidal",
    "StatisticalTopK",
    "TopK",
    "Transformer",
    "TransformerConfig",
    "TreePositions",
    "TreeRelations",
    "YarnScaling",
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
