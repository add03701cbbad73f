"""Tokens that come a few at a time, in absorbed form, give what the whole sequence gives at once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from dsv3_jax import mesh, ops
from dsv3_jax.config import Yarn
from dsv3_jax.model import cached, model
from dsv3_jax.model.cached import Cache, Rows, Served
from dsv3_jax.model.model import Model
from dsv3_jax.ops.context import WHOLE
from dsv3_jax.ops.held import as_it_is
from dsv3_jax.pipeline.execute import on_each_device
from dsv3_jax.pipeline.objective import Batch
from tests.conftest import SMALL, mesh_of, parts_of

YARN = Yarn(factor=4.0, original_length=8)
LENGTH, SLOTS = 24, 8
COUNTS = np.array([24, 3, 17, 1, 8, 23, 2, 16], np.int32)
OPS = ops.float32()
ROWS = P(mesh.AXES)


def weights(c, std=0.2):
    made = jax.jit(partial(Model.init, c=c, std=std))(jax.random.key(0))
    bias = jax.random.normal(jax.random.key(1), (c.balanced_layers, c.experts)) * 0.1
    return made, jax.device_put(bias, P())


@partial(jax.jit, static_argnames=("c", "ops"))
def at_once(weights, bias, tokens, counts, c, ops):
    """Hidden states of the main model, and of the first depth of MTP."""
    specs = mesh.specs(weights)

    def device(weights, bias, tokens, counts):
        prepared, _ = ops.prepare(weights, specs)
        weights, bias = ops.attach(mesh.vary(weights), prepared), mesh.vary(bias)
        segments = (jnp.arange(tokens.shape[1])[None] < counts[:, None]).astype(jnp.int32)
        hidden, _ = model.trunk(weights, specs, bias, tokens[:, :-1], segments[:, :-1], c, ops)
        after = bias[c.routed_layers :]
        further = Batch(tokens, segments).mine(WHOLE, 1 + c.mtp_depth)
        deep, _ = model.deeper(weights, specs, after, hidden, *further, 1, c, ops)
        return mesh.vary((hidden, deep))

    return on_each_device(device, (ROWS, ROWS))(weights, bias, tokens, counts)


@partial(jax.jit, static_argnames=("c", "attend", "ops"))
def by_parts(weights, cache, tokens, counts, c, attend, ops):
    """The same of some tokens, and the cache with them."""

    def device(weights, cache, tokens, counts):
        weights, cache, tokens, counts = mesh.vary((weights, cache, tokens, counts))
        rows = Rows(jnp.arange(len(counts)), cache.lengths, counts)
        args = (attend(rows, c, ops), rows.real(tokens.shape[1] - 1), c, ops)
        hidden, held = cached.trunk(weights, tokens[:, :-1], cache.tokens, *args)
        deep, held = cached.deeper(weights, hidden, tokens[:, 1:], held, *args)
        return hidden, deep, Cache(held, cache.lengths + counts)

    outs = (ROWS, ROWS, mesh.specs(cache))
    return on_each_device(device, outs)(weights, cache, tokens, counts)


def parts(tokens, counts, sizes):
    """Tokens of each part with the one behind it, and how many of a row are real."""
    start = 0
    for size in sizes:
        piece = tokens[:, start : start + size + 1]
        yield piece, np.clip(counts - start, 0, size).astype(np.int32)
        start += size


@pytest.mark.parametrize(
    ("sizes", "yarn", "shape"),
    [
        ((16, 8), None, (1, 1)),
        ((1,) * 24, YARN, (1, 1)),
        ((7, 1, 2, 1, 13), YARN, (2, 4)),
        ((24,), None, (2, 4)),
    ],
    ids=["halves", "one by one, yarn", "ragged, yarn, data 2, experts 4", "whole, data 2, experts 4"],
)
def test_every_position_is_that_of_the_training_pass(sizes, yarn, shape):
    c = dataclasses.replace(SMALL, yarn=yarn)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, c.vocab, (SLOTS, LENGTH + 1), np.int32)
    with jax.set_mesh(mesh_of(*shape)):
        w, bias = weights(c)
        place = lambda a: jax.device_put(a, P(mesh.AXES))  # noqa: E731
        want = [np.asarray(state) for state in at_once(w, bias, place(tokens), place(COUNTS), c, OPS)]
        served = Served.of(parts_of(w, bias), c, jnp.float32, as_it_is)
        cache = jax.jit(lambda: Cache.init(c, SLOTS, LENGTH, c.layers + 1, jnp.float32))()
        start, attend = 0, cached.first_tokens
        for piece, counts in parts(tokens, COUNTS, sizes):
            *states, cache = by_parts(served, cache, place(piece), place(counts), c, attend, OPS)
            got = [np.asarray(state) for state in states]
            for row, count in enumerate(counts):
                here = slice(start, start + count)
                np.testing.assert_allclose(got[0][row, :count], want[0][row, here], atol=1e-5, rtol=1e-5)
                # At the last position the training pass has no token to look ahead to.
                seen = slice(start, min(start + count, COUNTS[row] - 1))
                np.testing.assert_allclose(
                    got[1][row, : max(0, seen.stop - start)], want[1][row, seen], atol=1e-5, rtol=1e-5
                )
            start, attend = start + piece.shape[1] - 1, cached.further_tokens
        np.testing.assert_array_equal(cache.lengths, COUNTS)
        assert cache.tokens.shape == (c.layers + 1, SLOTS, LENGTH, c.kv_rank + c.d_rope)


def test_products_in_fp8_err_as_those_of_training_do():
    every = {"experts": 4, "top_k": 4, "groups": 1, "top_groups": 1}  # else some tokens choose other experts
    c = dataclasses.replace(SMALL, d_model=256, d_expert=128, d_dense=256, **every)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, c.vocab, (SLOTS, LENGTH + 1), np.int32)
    counts, fp8 = np.full_like(COUNTS, LENGTH), ops.fp8()
    with jax.set_mesh(mesh_of(2, 4)):
        place = lambda a: jax.device_put(a, ROWS)  # noqa: E731
        w, bias = weights(c, 0.06)
        exact, training = (at_once(w, bias, place(tokens), place(counts), c, o)[0] for o in (OPS, fp8))
        served = Served.of(parts_of(w, bias), c, fp8.dtype, fp8.hold)
        cache = jax.jit(lambda: Cache.init(c, SLOTS, LENGTH, c.layers + 1, fp8.dtype))()
        attend, states = cached.first_tokens, []
        for piece, count in parts(tokens, counts, (8, 1, 15)):
            hidden, _, cache = by_parts(served, cache, place(piece), place(count), c, attend, fp8)
            states.append(np.asarray(hidden))
            attend = cached.further_tokens
    got, expected = np.concatenate(states, 1), error(training, exact)
    assert 0.02 < expected < 0.2
    assert error(got, exact) < 1.1 * expected and error(got, training) < expected


def error(a, b):
    """Root mean square, relative."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))
