"""Published checkpoints to our parameters and back: `config.json` with safetensors files.

* `load` load_pretrained: to a model and its parameters, leaf by leaf, straight to where they are to lie
* `save` save_pretrained: what `transformers` loads again
* `files` their tensors, read lazily; `mapping` which part of which tensor is which of our parameters
* `settings` config.json, read to its last key; `family` and `registry` the kinds of models
* `tokenizers` the tokenizers that come with them; `minilm` sentence embeddings
* `gpt2`, `llama` (and Mistral, Qwen2, Qwen3), ... one file a family
"""

from .load import Pretrained, load_pretrained
from .minilm import load_minilm, sentence_embeddings
from .save import save_pretrained
from .tokenizers import TextStream, Tokenizer, load_tokenizer, stream_text

__all__ = [
    "Pretrained",
    "TextStream",
    "Tokenizer",
    "load_minilm",
    "load_pretrained",
    "load_tokenizer",
    "save_pretrained",
    "sentence_embeddings",
    "stream_text",
]
