"""Delta tuning: train a small part of a model, or a small thing beside it, and store only that.

`attach` puts methods where addresses say. Rooms: `addresses` (the address language), `attach` (the tuned
model), `sites` (deltas at module calls), `leaves` (deltas on parameter arrays), `methods` (what a method
is), one file per method, `storage` (delta files), `summary` and `tree` (what is tuned, added, frozen).
What is done with trained deltas: `switching`, `mixed_batches`, `merging`, `conversion` (to LoRA),
`combination` and `joining`, `stacking` (of layers), `generation`; `axes` says how they lie on a mesh.
"""

from .adalora import AdaLoRA
from .adapter import Adapter
from .addresses import Address
from .attach import BoundModel, Entry, Spec, Tuned, attach, attach_leaves
from .axes import delta_axes
from .bitfit import BitFit
from .combination import combine
from .compacter import Compacter
from .conversion import Converted, to_lora
from .diff_pruning import DiffPruning, project
from .dora import DoRA
from .flax_prefix import FlaxPrefix
from .full import Full
from .generation import TunedTransformer, as_transformer
from .ia3 import IA3, ia3_spec
from .intrinsic import SAID
from .joining import join
from .last_layers import last_layers
from .layer_norm import LayerNormTuning
from .lora import LoRA
from .low_rank_adapter import LowRankAdapter
from .merging import lost_in_merge, safe_merge
from .methods import LeafMethod, Method, Site, SiteMethod
from .mixed_batches import apply_tasks, stack_tasks
from .nnx import NNXModel, attach_nnx, nnx_model
from .oft import OFT
from .parallel_adapter import ParallelAdapter
from .prefix import Prefix
from .prefix_words import prefix_from_words
from .prompt_encoder import PromptEncoder
from .random_subset import RandomSubset, SparseOffset
from .registry import METHODS
from .reparameterised import folded
from .shift_positions import ShiftPositions
from .soft_prompt import SoftPrompt
from .stacking import stack_delta, unstack_delta
from .storage import backbone_hash, load_delta, read_header, save_delta
from .summary import Row, byte_count, parameter_count, summary
from .switching import entry_names, only, scaled, without
from .tree import tree
from .tree_drawing import to_html, to_svg
from .vera import VeRA

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "SAID",
    "AdaLoRA",
    "Adapter",
    "Address",
    "BitFit",
    "BoundModel",
    "Compacter",
    "Converted",
    "DiffPruning",
    "DoRA",
    "Entry",
    "FlaxPrefix",
    "Full",
    "LayerNormTuning",
    "LeafMethod",
    "LoRA",
    "LowRankAdapter",
    "Method",
    "NNXModel",
    "ParallelAdapter",
    "Prefix",
    "PromptEncoder",
    "RandomSubset",
    "Row",
    "ShiftPositions",
    "Site",
    "SiteMethod",
    "SoftPrompt",
    "SparseOffset",
    "Spec",
    "Tuned",
    "TunedTransformer",
    "VeRA",
    "apply_tasks",
    "as_transformer",
    "attach",
    "attach_leaves",
    "attach_nnx",
    "backbone_hash",
    "byte_count",
    "combine",
    "delta_axes",
    "entry_names",
    "folded",
    "ia3_spec",
    "join",
    "last_layers",
    "load_delta",
    "lost_in_merge",
    "nnx_model",
    "only",
    "parameter_count",
    "prefix_from_words",
    "project",
    "read_header",
    "safe_merge",
    "save_delta",
    "scaled",
    "stack_delta",
    "stack_tasks",
    "summary",
    "to_html",
    "to_lora",
    "to_svg",
    "tree",
    "unstack_delta",
    "without",
]
