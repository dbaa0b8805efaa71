"""What CPM-Ant and CPM-Bee read: their tokenizers, and the JSON that CPM-Bee takes for a task.

* `vocabulary` greedy longest match; `ant` CPM-Ant's tokenizer; `bee` CPM-Bee's, with words of the moment
* `tree` JSON to segments and how they are related; `sample` to ids, and ids to targets
* `batch` samples to the arrays of a batch, packed for training or padded for answering
* `writing` a model that scores the next words; `answers` what it answers, written back into the JSON
"""

from .answers import Answered, answer
from .ant import AntTokenizer
from .batch import Batch, left_padded, pack
from .bee import BeeTokenizer, Names
from .sample import Sample, encode
from .vocabulary import Vocabulary, longest_match

__all__ = [
    "Answered",
    "AntTokenizer",
    "Batch",
    "BeeTokenizer",
    "Names",
    "Sample",
    "Vocabulary",
    "answer",
    "encode",
    "left_padded",
    "longest_match",
    "pack",
]
