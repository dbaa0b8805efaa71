"""Published models' tokenizers: one interface over the files that they come in.

`interface` what every tokenizer does · `load` finds the files, the special tokens and what surrounds a text ·
`fast` the `tokenizers` library · `sentences` sentencepiece models · `chatglm` ChatGLM-6B's ·
`stream` ids to text as they arrive
"""

from .interface import SpecialTokens, Tokenizer
from .load import load_tokenizer
from .stream import TextStream, stream_text

__all__ = ["SpecialTokens", "TextStream", "Tokenizer", "load_tokenizer", "stream_text"]
