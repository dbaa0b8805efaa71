"""Our processors of logits and those of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from modicum.models.generation import sampling as ours

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers
torch.set_num_threads(1)

LOGITS = np.random.default_rng(0).normal(0, 3, (6, 200)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 200, (6, 12))
SEEN = np.zeros((6, 200), bool)
np.put_along_axis(SEEN, IDS, True, 1)
PROCESSORS = [
    (lambda x: ours.penalise_repetition(x, SEEN, 1.3), "RepetitionPenaltyLogitsProcessor", (1.3,)),
    (lambda x: ours.penalise_repetition(x, SEEN, 0.6), "RepetitionPenaltyLogitsProcessor", (0.6,)),
    (lambda x: ours.restrict(x, {"temperature": np.float32(0.7)}), "TemperatureLogitsWarper", (0.7,)),
    *[(lambda x, k=k: ours.keep_top_k(x, k), "TopKLogitsWarper", (k,)) for k in (1, 5, 200, 500)],
    *[(lambda x, p=p: ours.keep_top_p(x, p), "TopPLogitsWarper", (p,)) for p in (0.05, 0.5, 0.9, 0.99)],
    *[(lambda x, p=p: ours.keep_min_p(x, p), "MinPLogitsWarper", (p,)) for p in (0.01, 0.3, 1.0)],
    (
        lambda x: ours.forbid(x, np.asarray([3, 9]), np.asarray(True)),
        "MinNewTokensLengthLogitsProcessor",
        (0, 99, [3, 9]),
    ),
]


@pytest.mark.parametrize("function, name, arguments", PROCESSORS, ids=[f"{n}{a}" for _, n, a in PROCESSORS])
def test_processors_agree(function, name, arguments):
    processor = getattr(transformers, name, None) or getattr(transformers.generation.logits_process, name)
    expected = processor(*arguments)(torch.tensor(IDS), torch.tensor(LOGITS)).numpy()
    got = np.asarray(function(jnp.asarray(LOGITS)))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
