"""Meshes: bad ones end in one sentence; dispatch is a permutation on any of them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax import mesh
from dsv3_jax.ops.dispatch import AllToAll, Route, direct, in_rounds
from dsv3_jax.pipeline.placement import bring
from tests.conftest import mesh_of
from tests.kernels import harness


@pytest.mark.parametrize("data,expert,need", [(3, 2, 6), (16, 1, 16)])
def test_a_mesh_that_is_not_the_devices_names_both_numbers_and_the_keys(data, expert, need):
    with pytest.raises(ValueError, match=rf"config.mesh.data={data} .* needs {need} devices but JAX sees 8"):
        mesh.make_mesh(data=data, expert=expert)


@harness.needs_libtpu
def test_over_slices_only_the_data_axis_crosses_between_them():
    devices = harness.absent("v6e", slices=2)
    crossing = mesh.make_mesh(2, 2, 2, devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(crossing)
    np.testing.assert_array_equal(slices, np.broadcast_to([[0], [1]], (2, 2, 2)))
    with pytest.raises(ValueError, match="config.mesh.data=1 does not split over 2 slices"):
        mesh.make_mesh(4, 1, 2, devices)


@pytest.mark.parametrize(
    ("processes", "share"),
    [
        ([[[0, 0], [1, 1]], [[0, 0], [1, 1]]], (0, 2)),  # [pipeline, data, expert]
        ([[[1, 1], [1, 1]], [[0, 0], [0, 0]]], (0, 1)),  # a stage each: both load everything
        ([[[1, 0], [1, 0]], [[3, 2], [3, 2]]], (1, 2)),  # rows of a process apart
        ([[[0, 0], [0, 1]], [[0, 0], [0, 1]]], None),
    ],
)
def test_processes_load_what_their_devices_work_on(monkeypatch, processes, share):
    grid = np.vectorize(lambda process: SimpleNamespace(process_index=process))(np.array(processes))
    monkeypatch.setattr(jax.sharding, "get_mesh", lambda: SimpleNamespace(devices=grid))
    if share is not None:
        assert mesh.share_of_process() == share
    else:
        with pytest.raises(ValueError, match="which are not equal"):
            mesh.share_of_process()


def test_weights_are_split_over_all_devices_where_they_divide():
    specs = {size: P(None, mesh.EVERYWHERE) for size in (16, 12, 7)}
    with jax.set_mesh(mesh_of(2, 2, 2)):
        laid = {size: mesh.dividing(spec, (3, size)) for size, spec in specs.items()}
    assert laid == {16: specs[16], 12: P(None, mesh.SHARDS), 7: P(None, mesh.SHARDS)}


@pytest.mark.parametrize("names", [mesh.SHARDS, mesh.EVERYWHERE])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_is_brought_its_layers_whole(names, axis):
    layers = np.array([[3, 0], [1, 2]])
    spec = P(None, *(names if n == axis else None for n in range(2)))
    stack = np.arange(4 * 16 * 16, dtype=np.float32).reshape(4, 16, 16)

    def device(w):
        return jax.lax.all_gather(bring(w, spec, layers), mesh.AXES)

    with jax.set_mesh(mesh_of(2, 2, 2)):
        brought = jax.jit(jax.shard_map(device, out_specs=P(), check_vma=False))(jax.device_put(stack, spec))
    of_ranks = brought.reshape(2, 4, 2, 16, 16)  # by pipeline, then by data and expert
    for alike in range(4):
        np.testing.assert_array_equal(of_ranks[:, alike], stack[layers])


@pytest.mark.parametrize("sizes", [(0, 1), (-1, 8)])
def test_an_axis_below_one_is_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        mesh.make_mesh(data=sizes[0], expert=sizes[1])


def test_what_does_not_divide_is_named_all_at_once(c):
    with pytest.raises(ValueError) as error:
        mesh.check_divides(c, batch_size=10, microbatches=2, data=3, expert=5, pipeline=5)
    message = str(error.value)
    for words in (
        "d_model=32",
        "experts=8",
        "config.mesh.data=3 x config.mesh.pipeline=5",
        "config.mesh.expert=5",
        "batch_size=10",
    ):
        assert words in message


def dispatched(tokens, chosen, weights, experts, shape, scale, dispatcher):
    """Each row multiplied by a number of its expert's, and combined."""

    def once(scale, x, route):
        arrived, way = dispatcher.dispatch(x, route, experts)
        local = experts // jax.lax.axis_size(mesh.EXPERT)
        first = jax.lax.axis_index(mesh.EXPERT) * local
        ends = jnp.cumsum(arrived.sizes + -arrived.sizes % dispatcher.alignment)
        expert = jnp.searchsorted(ends, jnp.arange(arrived.rows.shape[0]), side="right")
        factor = scale[jnp.clip(first + expert, 0, experts - 1)] * arrived.weights
        return dispatcher.combine(arrived.rows * factor[:, None], way)

    def device(x, route, scale):
        y = in_rounds(once, dispatcher, scale, x, route, experts)
        return jax.lax.psum(y, mesh.PIPELINE)

    with jax.set_mesh(mesh_of(*shape)):
        place = lambda x: jax.device_put(x, P(mesh.TOKENS, None))  # noqa: E731

        @jax.jit
        def run(x, weights, scale):
            inner = lambda x, e, w, s: device(*mesh.vary((x, Route(e, w), s)))  # noqa: E731
            return jax.shard_map(inner, out_specs=P(mesh.TOKENS, None))(x, place(chosen), weights, scale)

        y, pull = jax.vjp(run, place(tokens), place(weights), jax.device_put(scale, P()))
        return jax.tree.map(
            np.asarray, (y, *pull(place(np.cos(np.arange(y.size)).reshape(y.shape).astype(np.float32))))
        )


@pytest.mark.parametrize(
    ("shape", "tokens", "dispatcher"),
    [
        ((1, 1), 16, AllToAll()),
        ((1, 4), 16, AllToAll()),
        ((2, 2), 16, AllToAll(alignment=4)),
        ((1, 8), 16, AllToAll(exchange=direct)),
        ((1, 4), 1024, AllToAll(room=0.5)),  # 128 of at most 512 rows a round
        ((2, 2), 1024, AllToAll(alignment=4, room=0.5, exchange=direct)),
    ],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), one_expert=st.booleans())
def test_every_token_meets_its_experts_whatever_the_load(shape, tokens, dispatcher, seed, one_expert):
    rng = np.random.default_rng(seed)
    k, experts = 3, 8
    x = rng.normal(size=(tokens, 5)).astype(np.float32)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    if one_expert:  # the worst load: everything on the experts of one device
        chosen[:] = np.arange(k)
    weights = rng.random((tokens, k)).astype(np.float32)
    scale = rng.normal(size=experts).astype(np.float32)
    y, dx, dw, dscale = dispatched(x, chosen, weights, experts, shape, scale, dispatcher)
    g = np.cos(np.arange(y.size)).reshape(y.shape)
    factor = (scale[chosen] * weights).sum(1, keepdims=True)
    along = (g * x).sum(1, keepdims=True)
    np.testing.assert_allclose(y, x * factor, atol=1e-5)
    np.testing.assert_allclose(dx, g * factor, atol=1e-5)
    np.testing.assert_allclose(dw, along * scale[chosen], atol=1e-5)
    want = np.bincount(chosen.reshape(-1), (along * weights).reshape(-1), experts)
    np.testing.assert_allclose(dscale, want, rtol=1e-4, atol=1e-3)
