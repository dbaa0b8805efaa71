"""How good a model is on text and on tasks.

* `perplexity` with a window that slides over a long text; `scoring` log-likelihoods of many continuations
* `harness` the adapter through which EleutherAI's lm-eval scores our models
"""

from .harness import harness_model
from .perplexity import Perplexity, strided_perplexity
from .scoring import Score, score_continuations

__all__ = ["Perplexity", "Score", "harness_model", "score_continuations", "strided_perplexity"]
