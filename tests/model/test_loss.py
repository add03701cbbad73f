"""The fused cross-entropy is the cross-entropy, and targets lie where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import loss
from dsv3_jax.model.model import ahead, counted
from dsv3_jax.ops.context import WHOLE
from dsv3_jax.pipeline.objective import Batch
from tests.conftest import SMALL


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_value_and_gradients_equal_those_of_log_softmax(chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 9, 6), (6, 11)))
    targets = jnp.asarray(rng.integers(0, 11, (2, 9)), jnp.int32)
    valid = jnp.asarray(rng.random((2, 9)) < 0.7)

    def plain(hidden, head):
        picked = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(valid, picked, 0.0))

    fused = lambda hidden, head: loss.cross_entropy(hidden, head, targets, valid)  # noqa: E731
    np.testing.assert_allclose(fused(hidden, head), plain(hidden, head), rtol=1e-5)
    got, want = jax.grad(fused, (0, 1))(hidden, head), jax.grad(plain, (0, 1))(hidden, head)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_targets_stay_in_their_document_and_off_the_end():
    assert SMALL.mtp_depth == 2
    tokens, segments = jnp.array([[5, 6, 7, 8, 9, 4]]), jnp.array([[1, 1, 1, 2, 2, 0]])
    batch = Batch(tokens, segments).mine(WHOLE, 3)
    np.testing.assert_array_equal(counted(batch.segments, 1, SMALL), [[True, True, False, True, False]])
    np.testing.assert_array_equal(counted(batch.segments, 2, SMALL), [[True, False, False, False, False]])
    np.testing.assert_array_equal(ahead(batch.tokens, 0, SMALL), [[5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(ahead(batch.tokens, 2, SMALL), [[7, 8, 9, 4, 0]])
    np.testing.assert_array_equal(ahead(batch.segments, 3, SMALL), [[2, 2, 0, -1, -1]])
