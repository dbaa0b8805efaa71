"""How good a model is on text and on tasks.

* `perplexity` with a window that slides over a long text
* `harness` the adapter through which EleutherAI's lm-eval scores our models
"""

from .perplexity import Perplexity, strided_perplexity

__all__ = ["Perplexity", "strided_perplexity"]
