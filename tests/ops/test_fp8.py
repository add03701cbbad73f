"""FP8 layers are BF16 layers within FP8's error, on every mesh alike, and keep fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import P

from dsv3_jax import mesh
from dsv3_jax.module import LINEAR, Module
from dsv3_jax.ops import plain
from dsv3_jax.ops.fp8 import Weight, attach, attend, gather, grouped_matmul, matmul, prepare, swiglu_matmul
from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import quantize
from tests.conftest import mesh_of
from tests.kernels.harness import hard, relative_error

# A product of operands in E4M3 is off by about 0.037 (two roundings of 0.026); at most three are in a row.
ONE, TWO, THREE = 0.045, 0.065, 0.08


def weight(w):
    return Weight(w, quantize.quantize(w, (128, 128)))


def pulled(f, arguments, g):
    y, pull = jax.vjp(f, *arguments)
    return y, *pull(g.astype(y.dtype))


def test_the_three_products_of_a_linear_layer():
    x, w, g = (jnp.asarray(hard("normal", *s), jnp.float32) for s in ((300, 200), (200, 260), (300, 260)))
    y, dx, dw = pulled(matmul, (x, weight(w)), g)
    for got, want in ((y, x @ w), (dx, g @ w.T), (dw.master, x.T @ g)):
        assert relative_error(got, want) < ONE
    assert dw.master.dtype == jnp.float32


def test_the_down_projection_and_its_recomputed_activation():
    hidden, w, g = (
        jnp.asarray(hard("normal", *s), jnp.float32) for s in ((300, 400), (200, 260), (300, 260))
    )
    y, dhidden, dw = pulled(swiglu_matmul, (hidden, weight(w)), g)
    want = pulled(plain.swiglu_matmul, (hidden, w), g)
    assert relative_error(y, want[0]) < ONE
    assert relative_error(dhidden, want[1]) < TWO
    assert relative_error(dw.master, want[2]) < THREE


def test_experts_multiply_and_learn_their_own_rows():
    sizes = jnp.array([100, 0, 129, 3], jnp.int32)
    rows = np.zeros((1024, 160), np.float32)
    for start, n in ((0, 100), (128, 129), (384, 3)):
        rows[start : start + n] = hard("normal", n, 160)
    mine = jnp.asarray((rows != 0).any(1))
    g = jnp.where(mine[:, None], hard("normal", 1024, 96), 0)
    w = jnp.asarray(np.stack([hard("normal", 160, 96) * (i + 1) for i in range(4)]))
    y, dx, dw = pulled(lambda x, w: grouped_matmul(x, w, sizes), (jnp.asarray(rows), weight(w)), g)
    plainly = lambda x, w: grouped.matmul(x, w, sizes, 128)  # noqa: E731
    want = pulled(plainly, (jnp.asarray(rows), w), g)
    assert relative_error(y[mine], want[0][mine]) < ONE
    assert relative_error(dx[mine], want[1][mine]) < ONE
    assert relative_error(dw.master, want[2]) < ONE
    assert not np.asarray(dw.master[1]).any()


def test_attention_and_its_projection():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 70, 4, n)), jnp.bfloat16) for n in (24, 24, 16))
    segments = jnp.asarray(np.arange(70) // 30 + 1, jnp.int32)[None].repeat(2, 0)
    w = jnp.asarray(rng.normal(size=(64, 96)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(2, 70, 96)), jnp.bfloat16)
    got = pulled(lambda q, k, v, w: attend(q, k, v, 0.2, segments, w), (q, k, v, weight(w)), g)
    ours = lambda q, k, v, w: plain.attend(q, k, v, 0.2, segments, w)  # noqa: E731
    want = pulled(ours, (q, k, v, w.astype(jnp.bfloat16)), g)
    assert relative_error(got[0], want[0]) < ONE
    for a, b in zip(got[1:4], want[1:4], strict=True):
        assert relative_error(a, b) < THREE
    assert relative_error(got[4].master, want[4]) < ONE


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (P(None, mesh.SHARDS, None), (4, 1)),
        (P(None, None, mesh.SHARDS), (4, 1)),
        (P(None, mesh.EVERYWHERE, None), (2, 2)),
    ],
    ids=str,
)
def test_devices_quantise_their_shards_as_one_device_would(spec, shape):

    class Layer(Module):
        w: jax.Array = struct.field(metadata=LINEAR)

    w = np.stack(
        [hard("normal", 200, 136), hard("one huge", 200, 136)]
    )  # 50 and 34 a device: blocks straddle
    with jax.set_mesh(mesh_of(*shape)):
        layer = Layer(jax.device_put(w, spec))

        def device(layer):
            prepared = attach(layer, prepare(layer, Layer(spec))[0])
            one = jax.tree.map(lambda x: x[1], prepared)
            return gather(one, mesh.layer_specs(Layer(spec))).w.blocks

        out = jax.shard_map(device, out_specs=P(), check_vma=False)(layer)
        want = quantize.quantize(jnp.asarray(w[1]), (128, 128))
        np.testing.assert_array_equal(out.scales, want.scales)
        np.testing.assert_array_equal(np.asarray(out.values), np.asarray(want.values))
