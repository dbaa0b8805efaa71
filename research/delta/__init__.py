"""Delta tuning: train a small part of a model, or a small thing beside it, and store only that.

`attach` puts methods where addresses say. Rooms: `addresses` (the address language), `attach` (the tuned
model), `sites` (deltas at module calls), `leaves` (deltas on parameter arrays), `methods` (what a method
is), one file per method, `storage` (delta files), `summary` (what is tuned, added, frozen).
"""

from .adapter import Adapter
from .addresses import Address
from .attach import BoundModel, Entry, Spec, Tuned, attach, attach_leaves
from .bitfit import BitFit
from .full import Full
from .lora import LoRA
from .methods import LeafMethod, Method, Site, SiteMethod
from .registry import METHODS
from .storage import backbone_hash, load_delta, read_header, save_delta
from .summary import Row, byte_count, parameter_count, summary

__all__ = [
    "METHODS",
    "Adapter",
    "Address",
    "BitFit",
    "BoundModel",
    "Entry",
    "Full",
    "LeafMethod",
    "LoRA",
    "Method",
    "Row",
    "Site",
    "SiteMethod",
    "Spec",
    "Tuned",
    "attach",
    "attach_leaves",
    "backbone_hash",
    "byte_count",
    "load_delta",
    "parameter_count",
    "read_header",
    "save_delta",
    "summary",
]
