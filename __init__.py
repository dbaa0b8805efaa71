"""Modicum: the small part of a large model that matters.

Tune under 1% of the parameters (`modicum.research.delta`), run under 20% of the feed-forward
neurons (`modicum.research.sparsity`), on Transformers (`modicum.models`) trained on any mesh
(`modicum.parallel`). Each claim is a study that anyone can run again (`modicum.experiments`).

Importing this package imports no other: `import modicum` takes milliseconds.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """What a user gave cannot be used.

    The message is one readable line: it names the field, file or array, the value found and what
    would be valid. The command line prints it without a traceback and exits with code 2.
    """
