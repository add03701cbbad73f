"""Meshes: bad ones end in one sentence; dispatch is a permutation on any of them."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model import moe
from dsv3_jax.ops.dispatch import AllToAll, Route, in_rounds
from dsv3_jax.ops.exchange import InFp8, cross, direct, ragged, scheduled
from dsv3_jax.pipeline.placement import bring
from pallas_kernels.all_to_all import Rows, first
from pallas_kernels.quantize import quantize
from pallas_kernels.scaled import dequantize, power_of_two
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


SIDES = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None, max_examples=60)
@given(st.tuples(SIDES, SIDES, SIDES, st.sampled_from([1, 2])), st.data())
def test_on_a_torus_groups_are_boxes_and_stages_are_next_to_each_other(sides, data):
    total = math.prod(sides)
    powers = lambda most: st.sampled_from([2**n for n in range(most.bit_length())])  # noqa: E731
    expert = data.draw(powers(total))
    parts = data.draw(powers(total // expert))
    sizes = (total // expert // parts, parts, expert)
    devices = [chip(place) for place in np.ndindex(sides)]
    grid = mesh._on_torus(sizes, data.draw(st.permutations(devices)))
    if grid is None:
        assert expert % sides[3]
        return
    assert grid.shape == sizes and {id(d) for d in grid.flat} == {id(d) for d in devices}
    places = np.array([d.coords for d in grid.flat]).reshape(*sizes, 3)
    for axes in ((2,), (1, 2)):
        apart = places.max(axes) - places.min(axes) + 1
        assert (apart.prod(-1) * sides[3] == math.prod(sizes[a] for a in axes)).all()
    steps = np.abs(np.diff(places, axis=0))
    assert ((steps > 0).sum(-1) <= 1).all()  # along one side of the torus


def chip(place):
    *coords, core = place
    return SimpleNamespace(platform="tpu", coords=tuple(coords), core_on_chip=core)


@pytest.mark.parametrize(
    ("sides", "sizes", "box"),
    [
        ((4, 4, 32, 2), (16, 1, 64), (4, 4, 2)),  # links of rings of four carry half as much as of eight
        ((8, 8, 16, 1), (16, 1, 64), (8, 8, 1)),
        ((2, 2, 1, 1), (1, 1, 4), (2, 2, 1)),
    ],
)
def test_experts_lie_where_links_are_loaded_least(sides, sizes, box):
    group = mesh._on_torus(sizes, [chip(place) for place in np.ndindex(sides)])[0, 0]
    places = np.array([d.coords for d in group])
    assert tuple(places.max(0) - places.min(0) + 1) == box


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


def dispatched(tokens, chosen, weights, experts, shape, scale, dispatcher, g):
    """Each row multiplied by a number of its expert's, and combined; and gradients of that times g."""

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
        return jax.tree.map(np.asarray, (y, *pull(place(g))))


@pytest.mark.parametrize(
    ("shape", "tokens", "dispatcher"),
    [
        ((1, 1), 16, AllToAll()),
        ((1, 4), 16, AllToAll()),
        ((2, 2), 16, AllToAll(alignment=4)),
        ((1, 8), 16, AllToAll(out=direct, home=direct)),
        ((1, 4), 1024, AllToAll(room=0.5)),  # 128 of at most 512 rows a round
        ((2, 2), 1024, AllToAll(alignment=4, room=0.5, out=direct, home=direct)),
        ((2, 2), 16, AllToAll(out=InFp8(scheduled))),
        ((1, 4), 1024, AllToAll(room=0.5, out=InFp8(direct), home=direct)),
        ((2, 2), 16, AllToAll(out=ragged, home=ragged)),
        ((2, 4), 16, AllToAll(alignment=4, hosts=2)),
        ((1, 8), 1024, AllToAll(room=0.5, out=InFp8(scheduled), hosts=2)),
        ((1, 8), 2048, AllToAll(room=0.5, hosts=4, reached=2)),
    ],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), one_expert=st.booleans())
def test_every_token_meets_its_experts_whatever_the_load(shape, tokens, dispatcher, seed, one_expert):
    rng = np.random.default_rng(seed)
    k, experts = 3, 8
    x, g = rng.integers(-8, 9, (2, tokens, 5)).astype(np.float32)  # FP8 has all of these
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    if one_expert:  # the worst load: everything on the experts of one device
        chosen[:] = np.arange(k)
    weights = rng.random((tokens, k)).astype(np.float32)
    scale = rng.normal(size=experts).astype(np.float32)
    y, dx, dw, dscale = dispatched(x, chosen, weights, experts, shape, scale, dispatcher, g)
    factor = (scale[chosen] * weights).sum(1, keepdims=True)
    along = (g * x).sum(1, keepdims=True)
    np.testing.assert_allclose(y, x * factor, atol=1e-5)
    np.testing.assert_allclose(dx, g * factor, atol=1e-5)
    np.testing.assert_allclose(dw, along * scale[chosen], atol=1e-5)
    want = np.bincount(chosen.reshape(-1), (along * weights).reshape(-1), experts)
    np.testing.assert_allclose(dscale, want, rtol=1e-4, atol=1e-3)


def by_definition(operand, output, starts, sizes, places, received, axis_name, axis_index_groups):
    """`ragged_all_to_all`, which XLA does not run on CPUs, in the words of its documentation."""
    everyone = range(jax.lax.axis_size(axis_name))
    groups = np.array(axis_index_groups or [everyone])
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name) for a in (operand, starts, sizes, places)
    )
    for peer in everyone:
        group, number = np.argwhere(groups == peer)[0]
        here = jnp.asarray(groups[group]) == me  # where this device is in the group of the peer, if at all
        mine, row = jnp.argmax(here), jnp.arange(len(output))
        there = row - places[peer, mine]
        wanted = jnp.any(here) & (there >= 0) & (there < sizes[peer, mine])
        sent = operands[peer].at[starts[peer, mine] + there].get(mode="clip")
        output = jnp.where(wanted[:, None], sent, output)
    return output


@pytest.mark.parametrize("groups", [None, ((0, 1), (2, 3)), ((0, 2), (1, 3))])
def test_a_ragged_exchange_sends_what_there_is_to_its_place(monkeypatch, groups):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", by_definition)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, cuda, tpu: cuda(*a))
    n = len(groups[0]) if groups else 4

    def device(x, sent):
        received = jax.lax.all_to_all(sent, mesh.EXPERT, 0, 0, tiled=True, axis_index_groups=groups)
        rows = Rows(sent, received)
        return ragged(x, rows, groups) - scheduled(first(x, sent), rows, groups)

    with jax.set_mesh(mesh_of(1, 4)):
        x = jax.random.normal(jax.random.key(0), (4 * n, 6, 2))
        counts = jax.random.randint(jax.random.key(1), (4 * n,), 0, 7)
        split = [jax.device_put(a, P(mesh.EXPERT, *[None] * (a.ndim - 1))) for a in (x, counts)]
        difference = jax.jit(jax.shard_map(device, out_specs=P(mesh.EXPERT, None, None)))(*split)
    np.testing.assert_array_equal(difference, 0)


@harness.needs_libtpu
def test_on_accelerators_the_ragged_exchange_is_xla_s():
    absent = np.array(harness.absent("v5p")).reshape(1, 1, -1)
    grid = jax.sharding.Mesh(absent, mesh.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    split = jax.sharding.NamedSharding(grid, P(mesh.EXPERT))
    x, counts = (
        jax.ShapeDtypeStruct(s, t, sharding=split)
        for s, t in (((16, 128, 256), "bfloat16"), ((16,), "int32"))
    )
    with jax.set_mesh(grid):
        f = jax.shard_map(lambda x, sent: ragged(x, Rows(sent, sent)), out_specs=P(mesh.EXPERT))
        assert "ragged-all-to-all" in jax.jit(f).lower(x, counts).compile().as_text()


HOSTS = 4


def crossing(chosen, experts, dispatcher):
    """Rows that devices send to other hosts."""

    def device(chosen):
        chosen = mesh.vary(chosen)
        route = Route(chosen, jnp.ones(chosen.shape))
        _, way = dispatcher.dispatch(mesh.vary(jnp.ones((len(chosen), 128))), route, experts)
        there = (way.outs[0].pair < way.outs[0].row.size).reshape(HOSTS, -1)
        mine = jax.lax.axis_index(mesh.EXPERT) // (jax.lax.axis_size(mesh.EXPERT) // HOSTS)
        return jax.lax.psum(jnp.sum(there) - jnp.sum(there[mine]), mesh.AXES)

    with jax.set_mesh(mesh_of(1, 8)):
        chosen = jax.device_put(chosen, P(mesh.EXPERT, None))
        return jax.jit(jax.shard_map(device, out_specs=P()))(chosen)


def test_fewer_rows_cross_hosts_with_two_hops_and_fewer_still_where_routing_limits_nodes():
    """Each token goes once to each host, or once to each device there; counted in what is really packed."""
    c = Config(experts=64, top_k=8, groups=HOSTS, top_groups=2)
    scores = jax.random.uniform(jax.random.key(0), (1, 512, 64))
    found = {}
    for groups in (2, HOSTS):
        limited = dataclasses.replace(c, top_groups=groups)
        chosen = np.asarray(moe.select(scores, jnp.zeros(64), limited))[0]
        sender = np.arange(512)[:, None] // 64
        for hops, held, near in ((1, chosen // 8, 2), (HOSTS, chosen // 16, 1)):
            far = held // near != sender // 2
            want = sum(len(np.unique(row[away])) for row, away in zip(held, far, strict=True))
            found[groups, hops] = crossing(chosen, 64, AllToAll(hosts=hops))
            assert found[groups, hops] == want
    assert found[2, HOSTS] < 0.6 * found[2, 1] < 0.6 * found[HOSTS, 1]
    assert found[2, HOSTS] <= 512 * 2 and found[HOSTS, HOSTS] > 1.3 * found[2, HOSTS]


def test_what_travels_in_fp8_is_found_again_by_the_product_that_quantises_it():
    """The bytes of E4M3 and of exponents, home in the type of the activations, and the same numbers."""
    x = (
        jax.random.normal(jax.random.key(0), (4, 16, 200), jnp.bfloat16)
        * jnp.exp2(jnp.arange(-8.0, 8.0))[None, :, None]
    )
    x = x.at[1, 3].set(0).at[2, 5, :128].set(0).astype(jnp.bfloat16)
    sent = []

    def itself(bits, rows, groups):
        sent.append(bits)
        return bits

    y = InFp8(itself)(x, Rows(*[jnp.full(4, 16)] * 2))
    before, after = (quantize(a.reshape(-1, 200), scale=power_of_two) for a in (x, y))
    np.testing.assert_array_equal(dequantize(before), dequantize(after))
    assert (sent[0].shape, sent[0].dtype, y.dtype) == ((4, 16, 202), jnp.uint8, jnp.bfloat16)


def test_gradients_of_what_comes_home_go_out_as_tokens_do():
    """E4M3 there, and the type of the activations back, in both passes."""

    def layer(x, g):
        y, pull = jax.vjp(lambda x: cross(InFp8(scheduled), scheduled, x, Rows(*[jnp.full(2, 4)] * 2)), x)
        z, back = jax.vjp(lambda x: cross(scheduled, InFp8(scheduled), x, Rows(*[jnp.full(2, 4)] * 2)), x)
        return y, *pull(g), z, *back(g)

    with jax.set_mesh(mesh_of(1, 2)):
        x = jax.device_put(jnp.ones((4, 4, 128), jnp.bfloat16), P(mesh.EXPERT, None, None))
        text = str(jax.make_jaxpr(jax.shard_map(layer, out_specs=P(mesh.EXPERT, None, None)))(x, x))
    moved = re.findall(r":(\w+)\[[\d,]*\]\S* = all_to_all", text)
    assert moved == ["u8", "bf16", "bf16", "u8"]
