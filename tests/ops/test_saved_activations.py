"""What a layer keeps for its backward pass, read from the compiled step, is what the recipe says."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax import ops
from dsv3_jax.config import Config
from dsv3_jax.model import size
from dsv3_jax.ops import recompute
from dsv3_jax.ops.plain import ALIGNMENT
from dsv3_jax.pipeline import execute
from dsv3_jax.pipeline.catalogue import one_f_one_b
from dsv3_jax.pipeline.objective import Batch, Weights
from tests.conftest import mesh_of
from tests.kernels import harness

# Sizes from which every dimension of a kept array can be told: 5 layers, 7 sequences, no weight has 7.
MODEL = Config(
    vocab=64, d_model=256, layers=5, dense_layers=0, mtp_depth=0, heads=2, d_nope=128, d_rope=64, d_value=128,
    q_rank=128, kv_rank=64, d_expert=128, experts=4, shared_experts=1, top_k=2, groups=1, top_groups=1,
)  # fmt: skip
SEQUENCES, LENGTH = 7, 128
TOKENS = SEQUENCES * LENGTH
ROWS = TOKENS * MODEL.top_k + MODEL.experts * (ALIGNMENT - 1)  # of the largest buffer that routing can need
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "f8e4m3fn": 1, "pred": 1}


def bfloat16(columns):
    return 2 * columns


def e4m3(columns):
    return columns + 4 * columns // 128  # a scale for each 128


def e5m6(columns):
    return 3 * columns // 2 + 4 * columns // 128


def kept_by_the_recipe(c, tokens, rows, attention, products):
    """Bytes of a layer, from those of columns of the attention output and of what products take."""
    token = bfloat16(c.d_model + c.d_model + c.q_rank + c.kv_rank + c.d_rope)  # input, residual, latents
    token += attention(c.heads * c.d_value) + 4 * c.heads  # and the logarithms of its normalisers
    token += products(2 * c.d_expert * c.shared_experts)
    return tokens * token + rows * (products(c.d_model) + products(2 * c.d_expert))


def kept_by_the_program(operations):
    """Bytes of a layer: arrays that the loop over layers carries backwards for each token or row."""
    here = mesh_of(1, 1)
    core = np.array(harness.absent("v5p")[:1]).reshape(here.devices.shape)
    there = Mesh(core, here.axis_names, axis_types=here.axis_types)
    step = lambda *a: execute.value_and_grad(*a, MODEL, operations, one_f_one_b)  # noqa: E731
    tokens, weight = (
        harness.shape(1, SEQUENCES, LENGTH + 1, dtype=jnp.int32),
        harness.shape(dtype=jnp.float32),
    )
    with jax.set_mesh(there):
        bias = harness.shape(MODEL.layers, MODEL.experts, dtype=jnp.float32)
        batch, weights = Batch(tokens, tokens), Weights(weight, weight)
        program = jax.jit(step).lower(size.abstract(MODEL), bias, batch, weights).compile()
    loops = re.findall(r"= \((.*)\) while\(", program.as_text())
    carried = [re.findall(r"(\w+)\[(\d+(?:,\d+)*)\]", loop) for loop in loops]
    kept = [sum(_bytes_for_tokens(*array) for array in loop) for loop in carried]
    return max(kept)


def _bytes_for_tokens(dtype, dimensions):
    """Of one layer, if there is a layer, and a sequence, token or row in each."""
    layers, *rest = map(int, dimensions.split(","))
    of_tokens = layers == MODEL.layers and rest and rest[0] in (SEQUENCES, TOKENS, ROWS)
    return BYTES[dtype] * math.prod(rest) if of_tokens else 0


PRECISIONS = {ops.bfloat16: (bfloat16, bfloat16), ops.fp8: (e5m6, e4m3)}


@harness.needs_libtpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_compiled_step_keeps_what_the_recipe_says(precision):
    kept = kept_by_the_program(precision(recompute.norms_and_up_projections))
    assert kept == kept_by_the_recipe(MODEL, TOKENS, ROWS, *PRECISIONS[precision])


def test_fp8_keeps_three_fifths_of_the_bytes_of_bfloat16_at_full_size():
    # Of a token and routed layer, without rows that alignment adds: the README's figures.
    c = Config()
    kept = [kept_by_the_recipe(c, 1, c.top_k, *widths) for widths in PRECISIONS.values()]
    assert kept == [254_592, 155_648]
