"""What is read from compiled programs equals what can be worked out by hand, for CPUs and for absent TPUs."""

import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import NamedSharding

from dsv3_jax.mesh import AXES, DATA, EXPERT, PIPELINE
from pallas_kernels import all_to_all
from pallas_kernels.grouped_matmul import tpu as grouped_matmul
from pallas_kernels.mla_attention import tpu as mla_attention
from tests.kernels.harness import compile_for, needs_libtpu, scaled_shape, shape
from tools.planning.program import Rates, read

TOPOLOGIES = {"v5p": "v5p:2x2x2", "tpu7x": "tpu7x:2x2x1"}  # of eight devices each
V5P, TPU7X = (pytest.param(chip, marks=needs_libtpu) for chip in TOPOLOGIES)
RATES = Rates(bf16=100e12, fp8=200e12, memory=1e12, links=dict.fromkeys(AXES, 50e9))
EACH = P(AXES)  # a leading axis that is split over all devices


def devices(chip):
    if chip == "cpu":
        return jax.devices()
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def text_of(chip, f, sizes, *operands):
    """The program of `f` on each device of a mesh; operands are local shapes, and how they are split."""
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    mesh = jax.sharding.Mesh(np.array(devices(chip)).reshape(sizes), AXES, axis_types=explicit)
    specs = tuple(spec for _, spec in operands)
    local = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=EACH, check_vma=False)
    whole = []
    for x, spec in operands:
        dims = (x.shape[0] * 8, *x.shape[1:]) if spec == EACH else x.shape
        whole.append(jax.ShapeDtypeStruct(dims, x.dtype, sharding=NamedSharding(mesh, spec)))
    options = {} if chip == "cpu" else {"xla_tpu_enable_async_all_to_all": "true"}
    return jax.jit(local).lower(*whole).compile(compiler_options=options).as_text()


def read_of(chip, f, sizes, *operands, rates=RATES, **given):
    text = text_of(chip, f, sizes, *operands)
    return read(text, dict(zip(AXES, sizes, strict=True)), rates, **given)


def many(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def batched(x, w):
    return jnp.einsum("gmk,gkn->gmn", x, w)


def heads(x, w):
    return jnp.einsum("mk,khd->mhd", x, w)


@pytest.mark.parametrize("chip", ["cpu", V5P, TPU7X])
@pytest.mark.parametrize(
    ("f", "x", "w", "flops"),
    [
        (many, shape(256, 512), shape(7, 512, 512), 7 * 2 * 256 * 512 * 512),
        (batched, shape(8, 256, 128), shape(8, 128, 384), 2 * 8 * 256 * 128 * 384),
        (heads, shape(512, 256), shape(256, 16, 128), 2 * 512 * 256 * 16 * 128),
    ],
)
def test_products_are_counted_with_the_turns_of_loops(chip, f, x, w, flops):
    found = read_of(chip, f, (2, 2, 2), (x, EACH), (w, P()))
    assert found.flops == flops
    assert found.seconds >= flops / RATES.bf16
    assert not found.collectives and not found.unknown and not found.loops


@pytest.mark.parametrize("chip", ["cpu", V5P, TPU7X])
def test_nested_loops_multiply(chip):
    def f(x, w):
        inner = lambda _, x: jnp.tanh(x @ w)  # noqa: E731
        return jax.lax.fori_loop(4, 7, lambda _, x: jax.lax.fori_loop(-2, 3, inner, x), x)

    found = read_of(chip, f, (2, 2, 2), (shape(64, 64), EACH), (shape(64, 64), P()))
    assert found.flops == 15 * 2 * 64**3
    assert not found.loops


def as_often_as_asked(x, w, turns):
    return jax.lax.fori_loop(0, turns[0], lambda _, x: x @ w, x)


@pytest.mark.parametrize("chip", ["cpu", V5P])
def test_the_caller_says_how_often_loops_turn_that_depend_on_data(chip):
    operands = (shape(64, 64), EACH), (shape(64, 64), P()), (shape(1, dtype=jnp.int32), P())
    text = text_of(chip, as_often_as_asked, (2, 2, 2), *operands)
    asked = []

    def turns(loop):
        asked.append(loop)
        return 2.5

    found = read(text, dict.fromkeys(AXES, 2), RATES, turns)
    assert found.flops == 2.5 * 2 * 64**3
    assert found.loops == {asked[0]: 2.5} and len(asked) == 1
    assert asked[0].op_name.endswith("while") and asked[0].function == "as_often_as_asked"


@pytest.mark.parametrize("chip", ["cpu", V5P])
def test_of_a_large_array_only_the_slice_moves(chip):
    def f(x, at):
        return jax.lax.dynamic_index_in_dim(x, at[0], keepdims=False) * 2 + 1

    rows, width = 512, 1 << 17
    found = read_of(
        chip, f, (2, 2, 2), (shape(rows, width, dtype=jnp.float32), P()), (shape(1, dtype=jnp.int32), P())
    )
    assert 4 * width <= found.bytes < 1.01 * 5 * 4 * width  # once in, once out, a copy at most between


@pytest.mark.parametrize("chip", ["cpu", V5P])
def test_what_is_read_and_written_counts_once(chip):
    size = 1 << 25
    found = read_of(chip, lambda x: x * 2 + 1, (2, 2, 2), (shape(size, dtype=jnp.float32), EACH))
    assert found.bytes == 2 * 4 * size
    assert found.seconds == found.bytes / RATES.memory
    assert found.flops == 0


def exchange(x, axis=EXPERT):
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


N, BOTH = 256 * 1024, (PIPELINE, DATA)
COLLECTIVES = [  # of N numbers of FP32 on a mesh of 2 x 1 x 4 or 2 x 2 x 2, and the bytes that a device sends
    (exchange, (2, 1, 4), "expert_all_to_all", (EXPERT,), 3 * N),
    (partial(exchange, axis=DATA), (2, 2, 2), "all_to_all", (DATA,), 2 * N),
    (lambda x: jax.lax.all_gather(x, DATA, tiled=True), (2, 2, 2), "all_gather", (DATA,), 4 * N),
    (lambda x: jax.lax.all_gather(x, BOTH, tiled=True), (2, 2, 2), "all_gather", BOTH, 12 * N),
    (lambda x: jax.lax.psum_scatter(x, EXPERT, tiled=True), (2, 1, 4), "reduce_scatter", (EXPERT,), 3 * N),
    (lambda x: jax.lax.psum(x, (PIPELINE, EXPERT)), (2, 2, 2), "all_reduce", (PIPELINE, EXPERT), 6 * N),
    (lambda x: jax.lax.ppermute(x, PIPELINE, [(0, 1)]), (2, 2, 2), "collective_permute", (PIPELINE,), 4 * N),
]  # fmt: skip


@pytest.mark.parametrize("chip", ["cpu", V5P, TPU7X])
@pytest.mark.parametrize(("f", "sizes", "kind", "axes", "sent"), COLLECTIVES)
def test_collectives_are_told_by_kind_and_axes_and_send_what_they_must(chip, f, sizes, kind, axes, sent):
    links = {axis: 10e9 * (n + 1) for n, axis in enumerate(AXES)}
    found = read_of(
        chip, f, sizes, (shape(N // 1024, 1024, dtype=jnp.float32), EACH), rates=RATES._replace(links=links)
    )
    assert set(found.collectives) == {kind} and set(found.by_axes) == {(kind, axes)}
    (one,) = found.collectives.values()
    assert (one.count, one.bytes) == (1, sent)
    parts = (1 / 3, 2 / 3) if len(axes) == 2 else (1,)  # of two axes, the slower one carries what is left
    seconds = sum(sent * part / links[axis] for part, axis in zip(parts, axes, strict=True))
    assert one.seconds == pytest.approx(seconds, rel=1e-12)
    if chip == "cpu":
        assert one.asynchronous == one.hidden_share == 0


def test_collectives_in_loops_count_each_turn():
    def f(x):
        return jax.lax.fori_loop(0, 6, lambda _, x: jax.lax.ppermute(x, PIPELINE, [(0, 1), (1, 0)]), x)

    found = read_of("cpu", f, (2, 2, 2), (shape(8, 128, dtype=jnp.float32), EACH))
    assert found.collectives["collective_permute"].count == 6
    assert found.collectives["collective_permute"].bytes == 6 * 4 * 8 * 128


X, A, B = shape(4096, 1024), shape(4096, 4096), shape(4096, 4096)
PRODUCT = 2 * 4096**3 / RATES.bf16  # seconds
OVERLAPPED = [
    (V5P, (2, 1, 4), "expert_all_to_all", exchange),
    (V5P, (2, 2, 2), "collective_permute", lambda x: jax.lax.ppermute(x, PIPELINE, [(0, 1), (1, 0)])),
    (TPU7X, (2, 2, 2), "all_gather", lambda x: jax.lax.all_gather(x, DATA, tiled=True)),
    (TPU7X, (2, 2, 2), "all_reduce", lambda x: jax.lax.psum(x, (PIPELINE, EXPERT))),
    (TPU7X, (2, 2, 2), "reduce_scatter", lambda x: jax.lax.psum_scatter(x, DATA, tiled=True)),
]


@pytest.mark.parametrize(
    ("chip", "sizes", "kind", "collective"),
    [pytest.param(*case[0].values, *case[1:], marks=case[0].marks, id=case[2]) for case in OVERLAPPED],
)
def test_a_product_between_start_and_end_hides_as_much_as_it_lasts(chip, sizes, kind, collective):
    def f(x, a, b, w):
        # The barrier makes XLA put the product before what needs the collective's result.
        moved, product = jax.lax.optimization_barrier((collective(x), a @ b))
        return moved @ w, product

    operands = (X, EACH), (A, EACH), (B, P()), (shape(1024, 1024), P())
    text = text_of(chip, f, sizes, *operands)
    mesh = dict(zip(AXES, sizes, strict=True))
    sent = read(text, mesh, RATES).collectives[kind].bytes
    for share in (0.25, 4.0):
        links = dict.fromkeys(AXES, sent * share / PRODUCT)
        one = read(text, mesh, RATES._replace(links=links)).collectives[kind]
        assert one.asynchronous == one.count == 1
        assert one.hidden_share == pytest.approx(min(1, share), rel=0.05)  # small copies may stand there too


@needs_libtpu
def test_an_exchange_with_nothing_beside_it_is_not_hidden():
    def f(x, w):
        return exchange(x @ w) @ w

    found = read_of("v5p", f, (2, 1, 4), (X, EACH), (shape(1024, 1024), P()))
    assert found.collectives["expert_all_to_all"].hidden_share < 0.01
    assert found.exposed[0].seconds == pytest.approx(found.collectives["expert_all_to_all"].seconds, rel=0.01)
    assert found.exposed[0].op_name.endswith("all_to_all")
    assert found.costly[0].op_name.endswith("dot_general")


@needs_libtpu
def test_a_kernel_that_exchanges_is_an_all_to_all_and_hides_what_its_halves_stand_around():
    def f(x, counts, w):
        rows = all_to_all.Rows(counts, counts)
        y, product = all_to_all.overlap(lambda w: w @ w, (w,), x, EXPERT, rows)
        return all_to_all.exchange(y + 1, EXPERT, rows), product

    operands = (shape(4, 512, 1024), EACH), (shape(4, dtype=jnp.int32), EACH), (shape(2048, 2048), P())
    found = read_of("v5p", f, (2, 1, 4), *operands).collectives["expert_all_to_all"]
    size = 3 * 512 * 1024 * 2
    assert (found.count, found.asynchronous, found.bytes) == (2, 1, 2 * size)
    hidden = min(size / RATES.links[EXPERT], 2 * 2048**3 / RATES.bf16)
    assert found.hidden == pytest.approx(hidden, rel=0.05)  # what prepares the second stands there too


def kernel(name, **estimate):
    def product(a, b, o):
        o[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    made = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    cost = {"cost_estimate": pl.CostEstimate(**estimate)} if estimate else {}
    return pl.pallas_call(product, out_shape=made, name=name, **cost)


@needs_libtpu
def test_flops_of_kernels_are_what_they_say_or_unknown():
    square = shape(256, 256), P()
    said = {"flops": 12345, "transcendentals": 0, "bytes_accessed": 1}
    assert read_of("v5p", kernel("some", **said), (2, 2, 2), square, square).flops == 12345
    found = read_of("v5p", kernel("other"), (2, 2, 2), square, square)
    assert found.flops == 0 and found.unknown == {"other": 1}


ROWS, WIDTH, COLUMNS, GROUPS = 512, 256, 384, 4
GROUPED = 2 * ROWS * WIDTH * COLUMNS
MATRICES, SIZES = shape(GROUPS, WIDTH, COLUMNS), shape(GROUPS, dtype=jnp.int32)
BATCH, LENGTH, HEADS, KEY, VALUE = 2, 512, 4, 192, 128
PAIRS = BATCH * HEADS * LENGTH * (LENGTH + 1) // 2  # of a query and a key that is not after it
SEGMENTS = shape(BATCH, LENGTH, dtype=jnp.int32)
Q, V = shape(BATCH, LENGTH, HEADS, KEY), shape(BATCH, LENGTH, HEADS, VALUE)
SUMS = shape(BATCH, HEADS, LENGTH, dtype=jnp.float32)


def attention(q, k, v, segments):
    return mla_attention.forward(q, k, v, 0.1, segments)


def gradients(q, k, v, *saved):
    return mla_attention.backward(q, k, v, 0.1, *saved)


@needs_libtpu
@pytest.mark.parametrize(
    ("f", "operands", "flops"),
    [
        (grouped_matmul.matmul, [shape(ROWS, WIDTH), MATRICES, SIZES], GROUPED),
        (grouped_matmul.matmul_transposed, [shape(ROWS, COLUMNS), MATRICES, SIZES], GROUPED),
        (grouped_matmul.weight_gradient, [shape(ROWS, WIDTH), shape(ROWS, COLUMNS), SIZES], GROUPED),
        (attention, [Q, Q, V, SEGMENTS], 2 * PAIRS * (KEY + VALUE)),
        # Of two kernels, both of which compute weights and their cotangents.
        (gradients, [Q, Q, V, SEGMENTS, V, SUMS, V], 2 * PAIRS * (4 * KEY + 3 * VALUE)),
    ],
)  # fmt: skip
def test_flops_of_our_kernels_follow_from_their_shapes(f, operands, flops):
    assert read(compile_for("v5p", f, *operands).as_text(), {}, RATES).flops == flops


@needs_libtpu
def test_fp8_products_run_at_their_own_rate():
    x, w = scaled_shape(ROWS, WIDTH, tile=(1, 128)), scaled_shape(GROUPS, COLUMNS, WIDTH, tile=(128, 128))
    f = lambda x, w, sizes: grouped_matmul.fp8_matmul(x, w, sizes, 1, jnp.bfloat16)  # noqa: E731
    text = compile_for("tpu7x", f, x, w, SIZES).as_text()
    found = read(text, {}, RATES._replace(memory=math.inf))
    assert found.flops == GROUPED
    assert found.seconds == GROUPED / RATES.fp8
