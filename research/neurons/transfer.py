"""Does one task's prompt serve another task? Its features are read and a new linear classifier is fitted.

Prompts are tuned together with a classifier of their task's labels, which another task has no use for. So
what is measured is how well the other task's labels can be read, linearly, from hidden states under it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from ... import InputError


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Softmax regression on standardised features: `kernel [D, C]`, `bias [C]`."""

    mean: np.ndarray
    deviation: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The likeliest label of each row of `features [N, D]`."""
        return (((features - self.mean) / self.deviation) @ self.kernel + self.bias).argmax(-1)

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """The share of rows that it gets right."""
        return float((self.predict(features) == labels).mean())


def fit_probe(features: np.ndarray, labels: np.ndarray, classes: int, decay: float = 1e-2) -> LinearProbe:
    """The minimum of the mean loss plus `decay / 2` times the squared kernel, by L-BFGS; there is only one.

    Raises `InputError` where a label has no row.
    """
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if missing := set(range(classes)) - set(y.tolist()):
        raise InputError(f"no row has label {min(missing)}: a probe for it cannot be fitted")
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
    x, truth = (x - mean) / deviation, np.eye(classes)[y]
    width = x.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        logits = x @ kernel + bias
        logp = logits - logsumexp(logits, axis=1, keepdims=True)
        error = (np.exp(logp) - truth) / len(x)
        value = -(logp * truth).sum() / len(x) + decay / 2 * (kernel**2).sum()
        return float(value), np.concatenate([(x.T @ error + decay * kernel).ravel(), error.sum(0)])

    found = minimize(loss, np.zeros(width * classes + classes), jac=True, method="L-BFGS-B").x
    kernel = found[: width * classes].reshape(width, classes)
    return LinearProbe(mean, deviation, kernel, found[width * classes :])
