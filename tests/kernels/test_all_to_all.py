"""Blocks change places between devices exactly, whole or in part, and nothing is read before it has come."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import all_to_all
from pallas_kernels.all_to_all import reference, tpu
from tests.kernels import harness

AXES = ("pipeline", "data", "expert")
TOKENS = ("data", "expert")
TYPES = [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def mesh_of(data, expert):
    devices = jax.devices()[: data * expert]
    return jax.make_mesh(
        (1, data, expert), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices
    )


def on(mesh, f, *arguments, check_vma=True):
    """Runs `f` on every device of a mesh, on its own part of the leading axis."""
    spec = jax.P(TOKENS)
    inside = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    return jax.tree.map(np.asarray, jax.jit(inside)(*arguments))


def blocks(mesh, rows, columns, dtype=np.float32, axis="expert"):
    """Random blocks of all devices, and counts of rows of which some are none and some all."""
    pairs = mesh.size * mesh.shape[axis]
    rng = np.random.default_rng(pairs * 1000 + rows)
    x = rng.integers(-7, 8, (pairs, rows, columns)).astype(dtype)
    counts = np.clip(rng.integers(-rows // 2, rows + rows // 2 + 1, pairs), 0, rows)
    return x, counts.astype(np.int32)


def by_hand(mesh, x, axis="expert"):
    """Blocks by device and peer, swapped."""
    data, expert = mesh.shape["data"], mesh.shape["expert"]
    by_device = x.reshape(data, expert, mesh.shape[axis], *x.shape[1:])
    return np.swapaxes(by_device, 1 if axis == "expert" else 0, 2).reshape(x.shape)


def cut(x, counts):
    there = np.arange(x.shape[1]) < counts[:, None]
    return np.where(there[:, :, None], x, np.zeros((), x.dtype))


def interpreted(x, counts=None, axis="expert", how=None):
    rows = None if counts is None else all_to_all.agree(counts, axis)
    return tpu.exchange(x, rows, axis, interpret=how or harness.on_tpu())


def same(got, want):
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), np.asarray(want).astype(np.float32))


@pytest.mark.parametrize("axis", TOKENS)
@pytest.mark.parametrize("sizes", [(1, 8), (2, 4), (8, 1)], ids=str)
def test_blocks_change_places(sizes, axis):
    mesh = mesh_of(*sizes)
    x, counts = blocks(mesh, 6, 5, axis=axis)
    same(on(mesh, lambda x: all_to_all.exchange(x, axis), x), by_hand(mesh, x, axis))
    part = on(mesh, lambda x, c: all_to_all.exchange(x, axis, all_to_all.agree(c, axis)), x, counts)
    same(part, by_hand(mesh, cut(x, counts), axis))


def test_the_gradient_is_the_exchange_back():
    mesh = mesh_of(2, 4)
    x, counts = blocks(mesh, 6, 5)
    g = blocks(mesh, 7, 5)[0][:, :6]

    def pull(x, counts, g):
        rows = all_to_all.agree(counts, "expert")
        whole = jax.vjp(lambda x: all_to_all.exchange(x, "expert"), x)[1](g)
        return *whole, *jax.vjp(lambda x: all_to_all.exchange(x, "expert", rows), x)[1](g)

    whole, part = on(mesh, pull, x, counts, g)
    same(whole, by_hand(mesh, g))
    same(part, cut(by_hand(mesh, g), counts))


def loss_of(both):
    """Of an exchange and a product, with a weight that all devices share and integers that pick rows."""

    def loss(x, weight, counts, order):
        rows = all_to_all.agree(counts, "expert")
        work = lambda x, weight, order: {"product": jnp.tanh(x[0][order] @ weight), "order": order}  # noqa: E731
        y, result = both(work, (x, weight, order), 3 * x, rows)
        return jnp.sum(y**3) + jnp.sum(result["product"])

    def values(x, counts):
        weight = jnp.linspace(-0.1, 0.1, x.shape[2] * 4).reshape(-1, 4)
        order = jnp.arange(x.shape[1])[::-1]
        value, (dx, dweight) = jax.value_and_grad(loss, (0, 1))(x, weight, counts, order)
        return value[None], dx, jax.lax.pcast(dweight, TOKENS, to="varying")[None]

    return values


def test_work_beside_an_exchange_changes_neither_value_nor_gradient():
    mesh = mesh_of(2, 4)
    x, counts = blocks(mesh, 6, 5)
    apart = lambda work, operands, x, rows: (all_to_all.exchange(x, "expert", rows), work(*operands))  # noqa: E731
    together = lambda work, operands, x, rows: all_to_all.overlap(work, operands, x, "expert", rows)  # noqa: E731
    got, want = on(mesh, loss_of(together), x, counts), on(mesh, loss_of(apart), x, counts)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)  # fused in another way


def test_integers_travel_and_have_no_gradient():
    mesh = mesh_of(1, 2)
    x, counts = blocks(mesh, 6, 5)

    def f(x, counts):
        y = all_to_all.exchange(x.astype(jnp.int32), "expert")
        z, _ = all_to_all.overlap(lambda c: c, (counts,), y, "expert")
        return jnp.sum(x * z), z

    back = on(mesh, lambda x, c: jax.grad(lambda x: f(x, c), has_aux=True)(x), x, counts)[1]
    same(back, x)


def test_what_cannot_be_exchanged_is_refused():
    mesh = mesh_of(1, 4)
    x, counts = blocks(mesh, 6, 5)
    with pytest.raises(ValueError, match=r"give one of shape \(4, T, D\)"):
        on(mesh, lambda x: all_to_all.exchange(x[:3], "expert"), x)
    with pytest.raises(ValueError, match="make them with `agree`"):
        on(mesh, lambda x, c: all_to_all.exchange(x, "expert", all_to_all.Rows(c, c[:1])), x, counts)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("devices", [2, 4, 8])
@harness.interprets
def test_the_kernel_exchanges_as_the_definition_does(devices, dtype):
    mesh = mesh_of(1, devices)
    x, counts = blocks(mesh, 96, 128, dtype)
    same(on(mesh, interpreted, x, check_vma=False), by_hand(mesh, x))
    same(on(mesh, interpreted, x, counts, check_vma=False), by_hand(mesh, cut(x, counts)))


@pytest.mark.parametrize("axis", TOKENS)
@harness.interprets
def test_the_kernel_exchanges_over_one_axis_of_a_mesh(axis):
    mesh = mesh_of(2, 4)
    x, counts = blocks(mesh, 64, 128, axis=axis)
    got = on(mesh, partial(interpreted, axis=axis), x, counts, check_vma=False)
    same(got, by_hand(mesh, cut(x, counts), axis))


@harness.interprets
def test_exchanges_over_two_axes_follow_each_other():
    mesh = mesh_of(2, 2)
    x, counts = blocks(mesh, 64, 128)

    def there_and_back(x, counts):
        rows = all_to_all.agree(counts, "expert")
        y = interpreted(interpreted(x, counts), axis="data")
        return tpu.exchange(interpreted(y, axis="data"), rows.back(), "expert", interpret=harness.on_tpu())

    same(on(mesh, there_and_back, x, counts, check_vma=False), cut(x, counts))


@harness.interprets
def test_more_rows_than_there_are_means_all():
    mesh = mesh_of(1, 2)
    x, counts = blocks(mesh, 64, 128)
    same(on(mesh, interpreted, x, np.full_like(counts, 1000), check_vma=False), by_hand(mesh, x))


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@harness.interprets
def test_it_does_not_matter_when_copies_happen(mode):
    mesh = mesh_of(1, 4)
    x, counts = blocks(mesh, 256, 128)
    how = dataclasses.replace(harness.on_tpu(), dma_execution_mode=mode)
    got = on(mesh, partial(interpreted, how=how), x, counts, check_vma=False)
    same(got, by_hand(mesh, cut(x, counts)))


@harness.interprets
def test_the_kernel_back_is_the_transpose():
    mesh = mesh_of(1, 4)
    x, counts = blocks(mesh, 64, 128)
    g = blocks(mesh, 32, 128)[0].repeat(2, 1)
    y = on(mesh, interpreted, x, counts, check_vma=False)
    back = lambda g, counts: tpu.exchange(  # noqa: E731
        g, all_to_all.agree(counts, "expert").back(), "expert", interpret=harness.on_tpu()
    )
    assert np.vdot(y, g) == np.vdot(x, on(mesh, back, g, counts, check_vma=False))  # small integers: exact


@harness.interprets
def test_a_kernel_that_does_not_wait_is_caught(monkeypatch, caplog):
    monkeypatch.setattr(tpu, "_wait", lambda part, semaphore: None)
    mesh = mesh_of(1, 2)
    x, _ = blocks(mesh, 64, 128)
    # Copies are made at once: those that are made when waited for would never be. A race that raises, as in
    # all other tests, would leave JAX with effects that failed.
    how = dataclasses.replace(harness.on_tpu(), dma_execution_mode="eager", on_race="warn")
    on(mesh, partial(interpreted, how=how), x, check_vma=False)
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in caplog.text


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(TYPES))
@harness.interprets
def test_the_kernel_serves_any_shape(rows, columns, dtype):
    mesh = mesh_of(1, 2)
    x, counts = blocks(mesh, rows, columns, dtype)
    same(on(mesh, interpreted, x, check_vma=False), by_hand(mesh, x))
    same(on(mesh, interpreted, x, counts, check_vma=False), by_hand(mesh, cut(x, counts)))


def test_both_forms_and_their_gradients_lower_for_tpu():
    mesh = jax.make_mesh((1, 2, 4), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    place = jax.sharding.NamedSharding(mesh, jax.P(TOKENS))
    x = jax.ShapeDtypeStruct((32, 64, 128), jnp.bfloat16, sharding=place)
    counts = jax.ShapeDtypeStruct((32,), jnp.int32, sharding=place)

    def loss(x, counts):
        rows = all_to_all.agree(counts, "expert")
        y, z = all_to_all.overlap(lambda a: a @ a.T, (x[0],), 2 * x, "expert", rows)
        return jnp.sum(all_to_all.exchange(y, "expert") ** 2) + jnp.sum(z)

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    with jax.set_mesh(mesh):
        f = jax.jit(jax.shard_map(jax.grad(loss), out_specs=jax.P(TOKENS)))
        text = jax.export.export(f, platforms=["tpu"], disabled_checks=unchecked)(x, counts).mlir_module()
    assert text.count("@tpu_custom_call") == 6  # two, one, and the same backward


def compiled(chip, f, *sizes, dtype=jnp.bfloat16):
    """The program of `f` of blocks and counts for a mesh of absent chips, inside a checked `shard_map`."""
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    devices = np.array(harness.absent(chip)).reshape(1, 2, -1)
    mesh = jax.sharding.Mesh(devices, AXES, axis_types=explicit)
    place = jax.sharding.NamedSharding(mesh, jax.P(TOKENS))
    pairs = mesh.size * mesh.shape["expert"]
    x = jax.ShapeDtypeStruct((pairs, *sizes), dtype, sharding=place)
    counts = jax.ShapeDtypeStruct((pairs,), jnp.int32, sharding=place)
    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(f, out_specs=jax.P(TOKENS))).lower(x, counts).compile()


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def some(x, counts):
    return all_to_all.exchange(x, "expert", all_to_all.agree(counts, "expert"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_the_kernel_compiles_at_full_size(chip, dtype):
    whole = lambda x, counts: all_to_all.exchange(x, "expert")  # noqa: E731
    assert kernels(compiled(chip, whole, 4096, 7168, dtype=dtype)) == 1
    assert kernels(compiled(chip, some, 4096, 7168, dtype=dtype)) == 1


@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_the_kernel_compiles_for_scales_and_odd_shapes(chip):
    whole = lambda x, counts: all_to_all.exchange(x, "expert")  # noqa: E731
    assert kernels(compiled(chip, some, 4096, 56, dtype=jnp.float32)) == 1
    assert kernels(compiled(chip, whole, 7, 100)) == 1
    assert kernels(compiled(chip, some, 7, 100)) == 0  # no tile of memory begins at a part of such a block


@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_work_stands_between_the_two_kernels(chip):
    def work(a):
        with jax.named_scope("between"):
            return a @ a.T

    def beside(x, counts):
        rows = all_to_all.agree(counts, "expert")
        y, z = all_to_all.overlap(work, (x[0] * 2,), x + 1, "expert", rows)
        return y, z[None]

    program = compiled(chip, beside, 1024, 7168)
    lines = program.as_text().split("\nENTRY", 1)[1].split("\n")
    calls = [i for i, line in enumerate(lines) if '"tpu_custom_call"' in line]
    product = [i for i, line in enumerate(lines) if "between/dot_general" in line and "fusion(" in line]
    assert len(calls) == 2 and product and calls[0] < min(product) and max(product) < calls[1]


@harness.needs_libtpu
def test_in_loops_the_second_kernel_gets_what_the_first_gave():
    def layer(x, counts):
        y, h = all_to_all.overlap(
            lambda a: jnp.tanh(a @ a.T), (x[0],), 2 * x, "expert", all_to_all.agree(counts, "expert")
        )
        return y + jnp.sum(h), None

    def loss(x, counts):
        body = jax.checkpoint(lambda x, _: layer(x, counts))
        return jnp.sum(jax.lax.scan(body, x, length=3)[0] ** 2)

    lines = compiled("v6e", jax.grad(loss), 1024, 2048).as_text().split("\n")
    source = {line.split(" = ")[0].strip(): line.split(" = ")[1] for line in lines if " = " in line}
    calls = {name: line for name, line in source.items() if '"tpu_custom_call"' in line}
    starts = {name: line.split("custom-call(")[0] for name, line in calls.items() if line.startswith("(")}
    assert len(starts) >= 2 and len(calls) == 2 * len(starts)
    for line in starts.values():
        assert line.count("bf16") == 2 and not re.search(r"bf16[^ ]*S\(1\)", line)  # HBM: S(1) would be VMEM
    for name in calls.keys() - starts.keys():
        future = re.findall(r"%[\w.-]+", calls[name].split("custom-call(")[1].split(")")[0])[-4:]
        parts = [re.search(r"get-tuple-element\((%[\w.-]+)\), index=(\d)", source[part]) for part in future]
        assert len({part[1] for part in parts}) == 1 and parts[0][1] in starts
        assert [part[2] for part in parts] == list("0123")


@harness.needs_libtpu
def test_the_exchange_back_is_a_kernel_too():
    back = jax.grad(lambda x, counts: jnp.sum(some(2 * x, counts) ** 2))
    assert kernels(compiled("v5p", back, 1024, 7168)) == 2


def test_rows_that_are_not_counted_are_zeros_whatever_they_were():
    got = reference.first(jnp.full((2, 3, 1), jnp.nan), jnp.asarray([0, 2], jnp.int32))
    same(got[:, :, 0], [[0, 0, 0], [np.nan, np.nan, 0]])
