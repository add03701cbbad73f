"""Weights held in FP8: those that were released, half the memory, and the text that they stand for."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax import mesh, ops
from dsv3_jax.inference.decode import Running, decode
from dsv3_jax.inference.engine import Engine, generated
from dsv3_jax.inference.request import Limits, Request
from dsv3_jax.model.cached import Served
from dsv3_jax.model.model import Model
from dsv3_jax.module import LINEAR, Module, map_linear
from dsv3_jax.ops.held import as_it_is, in_fp8
from pallas_kernels.scaled import Scaled, dequantize
from tests.conftest import SMALL, mesh_of, parts_of
from tests.kernels.harness import absent, needs_libtpu

BLOCK = 128


@settings(deadline=None, max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 2**32 - 1),
    narrow=st.booleans(),
    powers=st.booleans(),
)
def test_blocks_that_a_checkpoint_came_from_come_back(shape, seed, narrow, powers):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=shape).astype(np.float32) * 100
    numbers[::BLOCK, ::BLOCK] = 448.0  # as every block has that was scaled to its largest
    values = np.clip(numbers, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    blocks = [-(-n // BLOCK) for n in shape]
    exponents = rng.integers(-20, 0, blocks) if powers else rng.uniform(-20, 0, blocks)
    scales = np.exp2(exponents).astype(np.float32)
    spread = np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)[: shape[0], : shape[1]]
    master = jnp.asarray(values.astype(np.float32) * spread, jnp.bfloat16 if narrow else jnp.float32)
    held = in_fp8(master, master)
    np.testing.assert_array_equal(np.asarray(held.values), values)
    within = 0 if powers else 2**-8 if narrow else 2**-22
    np.testing.assert_allclose(held.scales, scales, rtol=within)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_experts_of_many_blocks_are_held_where_they_are_and_multiplied_as_in_training(shape):
    w = jax.random.normal(jax.random.key(0), (4, 200, 300))
    x, sizes = jax.random.normal(jax.random.key(1), (512, 200), jnp.bfloat16), jnp.full(4, 128)
    with jax.set_mesh(mesh_of(*shape)):
        split = jax.device_put(w, P("expert"))
        held = jax.jit(in_fp8)(split, split)
        assert mesh.spec(held.values) == mesh.spec(held.scales) == mesh.spec(split)
    held, fp8 = jax.tree.map(np.asarray, held), ops.fp8()
    plain = one_by_one(held.values, held.scales)
    np.testing.assert_array_equal(dequantize(held), plain)
    weight = fp8.attach(Linear(w), fp8.prepare(Linear(w), Linear(P()))[0]).w
    got = fp8.grouped_matmul(x, fp8.of_blocks(held), sizes)
    np.testing.assert_array_equal(got, fp8.grouped_matmul(x, weight, sizes))
    np.testing.assert_array_equal(ops.bfloat16().of_blocks(held), plain.astype(jnp.bfloat16))


class Linear(Module):
    """A matrix of products."""

    w: jax.Array = struct.field(metadata=LINEAR)


def one_by_one(values, scales):
    wide = values.astype(np.float32)
    for expert, row, column in np.ndindex(scales.shape):
        block = (expert, slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
        wide[block] *= scales[expert, row, column]
    return wide


def made(shape, c=SMALL):
    """Weights with values that depend on nothing but their place, on a mesh."""
    with jax.set_mesh(mesh_of(*shape)):
        return jax.jit(partial(fresh, c))()


def fresh(c):
    model = Model.init(jax.random.key(3), c, 0.25)
    return model, jnp.zeros((c.balanced_layers, c.experts), out_sharding=P())


def texts(served, shape, drafts):
    rng = np.random.default_rng(0)
    requests = [
        Request(prompt=rng.integers(0, SMALL.vocab, n).tolist(), most=12, seed=n, temperature=0.5 * (n % 2))
        for n in (3, 20)
    ]
    with jax.set_mesh(mesh_of(*shape)):
        limits = Limits(slots=4, length=32, part=32, steps=4, ends=1, drafts=drafts)
        return [tokens for tokens, _ in generated(Engine(served, SMALL, ops.float32(), limits), requests)]


def served(shape, hold):
    with jax.set_mesh(mesh_of(*shape)):
        return Served.of(parts_of(*made(shape)), SMALL, jnp.float32, hold)


@pytest.mark.slow
def test_text_is_that_of_the_numbers_that_are_held():
    held = served((1, 1), in_fp8)
    is_held = lambda w: isinstance(w, Scaled)  # noqa: E731
    plain = jax.tree.map(lambda w: dequantize(w) if is_held(w) else w, held, is_leaf=is_held)
    want = texts(plain, (1, 1), 0)
    assert all(len(set(tokens)) > 2 for tokens in want)
    assert texts(held, (1, 1), 1) == want  # with drafts
    assert texts(served((2, 2), in_fp8), (2, 2), 0) == want  # on a mesh that splits experts


def test_linear_layers_take_a_byte_a_weight_and_are_widened_one_layer_at_a_time():
    c = replace(SMALL, d_model=256, d_dense=512, d_expert=256, layers=8, dense_layers=8, mtp_depth=0, vocab=8)
    operations, arguments, temporaries = ops.bfloat16(), {}, {}
    with jax.set_mesh(mesh_of(1, 1)):
        for hold in (as_it_is, in_fp8):
            model, bias = made((1, 1), c)
            held = Served.of(parts_of(model, bias), c, operations.dtype, hold)
            running = jax.jit(partial(Running.init, c, operations, 1, 8, 0, 1))()
            lowered = decode.lower(held, running, c=c, ops=operations, steps=1)
            memory = lowered.compile().memory_analysis()
            arguments[hold], temporaries[hold] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    assert 0.5 < arguments[in_fp8] / arguments[as_it_is] < 0.53
    layer = sum(w.size for w in linear(model.dense)) // c.layers
    more = temporaries[in_fp8] - temporaries[as_it_is]
    assert 0 < more < 4 * 1.2 * layer, (more, layer)  # a CPU multiplies in FP32


@pytest.mark.slow
@needs_libtpu
def test_products_in_fp8_read_the_blocks_of_experts_without_widening_them():
    c = replace(SMALL, d_model=512, d_dense=512, d_expert=512, experts=64, mtp_depth=0, layers=2, vocab=128)
    axes = jax.sharding.AxisType.Explicit
    one = jax.sharding.Mesh(np.array(absent("v5p")[:1]).reshape(1, 1, 1), mesh.AXES, axis_types=(axes,) * 3)
    temporaries = {}
    with jax.set_mesh(one):
        for operations in (ops.bfloat16(), ops.fp8()):
            held = jax.eval_shape(lambda o=operations: Served.of(parts_of(*fresh(c)), c, o.dtype, in_fp8))
            running = jax.eval_shape(partial(Running.init, c, operations, 8, 128, 0, 1))
            compiled = decode.lower(held, running, c=c, ops=operations, steps=1).compile()
            temporaries[operations.hold] = compiled.memory_analysis().temp_size_in_bytes
    experts = 64 * 3 * 512 * 512 * 2  # bytes, in BF16
    assert temporaries[as_it_is] - temporaries[in_fp8] > experts > temporaries[in_fp8], temporaries


def linear(block):
    found = []
    map_linear(found.append, block)
    return found
