"""Published checkpoints to our parameters and back: `config.json` with safetensors files.

* `load` load_pretrained: to a model and its parameters, leaf by leaf, straight to where they are to lie
* `save` save_pretrained: what `transformers` loads again
* `files` a folder of tensors, or a name of the hub; `container` one safetensors file, read lazily
* `mapping` which part of which tensor is which of our parameters; `assemble` the one from the other
* `settings` config.json, read to its last key; `match` every tensor has a use, or the error lists it
* `family` and `registry` the kinds of models: a short file each (`gpt2`; `llama` with Mistral and Qwen; ...)
* `tokenizers` the tokenizers that come with them; `minilm` sentence embeddings
* `cpm` CPM's tokenizers, and CPM-Bee's tasks in JSON; `prepared` prompts with their positions and mask
* `alike` whether two configurations compute the same; `rope` rotary positions in config.json
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
