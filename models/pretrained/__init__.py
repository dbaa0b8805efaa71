"""Published checkpoints to our parameters and back: `config.json` with safetensors files.

* `load` load_pretrained: to a model and its parameters, leaf by leaf, straight to where they are to lie
* `save` save_pretrained: what `transformers` loads again
* `files` their tensors, read lazily; `mapping` which part of which tensor is which of our parameters
* `settings` config.json, read to its last key; `family` and `registry` the kinds of models
* `gpt2`, `llama` (and Mistral, Qwen2, Qwen3), ... one file a family
"""

from .load import Pretrained, load_pretrained
from .save import save_pretrained

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]
