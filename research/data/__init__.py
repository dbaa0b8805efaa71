"""Data: from files or the hub to batches that are a function of the seed and the step.

sources            local files, folders of splits, globs; checked, with a content fingerprint
hub                names on the Hugging Face hub
standard_library   the running Python's own library as a corpus and a classification task
tokenizers         byte-level BPE
packing            documents in rows of one length, indexed once and cached
examples           texts with labels
encoded            the same, and pairs of texts, in a published model's tokens
completions        prompts with the texts to be written
templates          a text made of several columns
batches            the order: training by (seed, step), evaluation in sequence
"""

from .batches import Batch, Batches, Rows, evaluation_batches
from .completions import Completions, encode_completions, same_lengths
from .encoded import encode_examples, same_length
from .examples import Examples, Labels, examples
from .packing import Packed, pack, packed_corpus
from .sources import SPLITS, Source, load_source, load_splits
from .standard_library import PARTS, Document, corpus_fingerprint, library_documents, snippets
from .templates import Template
from .tokenizers import Tokenizer, train_tokenizer

__all__ = [
    "PARTS",
    "SPLITS",
    "Batch",
    "Batches",
    "Completions",
    "Document",
    "Examples",
    "Labels",
    "Packed",
    "Rows",
    "Source",
    "Template",
    "Tokenizer",
    "corpus_fingerprint",
    "encode_completions",
    "encode_examples",
    "evaluation_batches",
    "examples",
    "library_documents",
    "load_source",
    "load_splits",
    "pack",
    "packed_corpus",
    "same_length",
    "same_lengths",
    "snippets",
    "train_tokenizer",
]
