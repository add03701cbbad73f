"""Fingerprints: equal wherever an array lies and however it is cut, different after any one change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax.training.fingerprint import as_hex, fingerprint, fingerprint_slice

AXES = ("pipeline", "data", "expert")


def make_mesh(*sizes):
    return jax.make_mesh(sizes, AXES, devices=jax.devices()[: int(np.prod(sizes))])


def on_disk(x):
    return fingerprint_slice(x, (0,) * x.ndim)


def draw(shape, dtype, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    if dtype == "bool":
        return bits[..., 0] > 127
    return bits.view(dtype)[..., 0]


@pytest.mark.parametrize(
    "dtype", ["float32", jnp.bfloat16, "float16", "int32", "uint32", "int8", "bool", jnp.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 3, 300, 70), (0, 4), (2, 0)])
def test_device_and_numpy_agree_on_every_type_and_shape(shape, dtype):
    x = draw(shape, dtype)
    np.testing.assert_array_equal(fingerprint({"x": jnp.asarray(x)})["x"], on_disk(x))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("spec", [P(), P("expert", "data", None), P(None, ("data", "expert"))])
def test_every_mesh_and_layout_has_the_same_fingerprint(sizes, spec):
    x = draw((8, 16, 6), jnp.bfloat16)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        words = fingerprint(jax.device_put(x, jax.NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(words, on_disk(x))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_in_any_order_add_up_to_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    x = draw(shape, "int32", data.draw(st.integers(0, 99)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted({0, shape[axis], *data.draw(st.lists(st.integers(0, shape[axis]), max_size=3))})
    total = np.zeros(2, np.uint32)
    for low, high in reversed(list(zip(cuts[:-1], cuts[1:], strict=True))):
        part = np.take(x, range(low, high), axis)
        total += fingerprint_slice(part, [low if a == axis else 0 for a in range(len(shape))])
    np.testing.assert_array_equal(total, on_disk(x))


def test_blocks_larger_than_the_cache_agree_with_their_rows():
    x = draw((3, 2, 300, 200), "int16")
    rows = [fingerprint_slice(x[i : i + 1, j : j + 1], (i, j, 0, 0)) for i in range(3) for j in range(2)]
    np.testing.assert_array_equal(np.sum(rows, axis=0, dtype=np.uint32), on_disk(x))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6 * 7 - 1), st.integers(0, 31), st.integers(0, 99))
def test_every_single_bit_changes_both_words(where, bit, seed):
    x = draw((6, 7), "uint32", seed)
    y = x.copy()
    y.flat[where] ^= np.uint32(1 << bit)
    assert np.all(on_disk(x) != on_disk(y))


def test_all_values_of_one_element_have_different_words():
    words = np.stack([fingerprint_slice(np.array([v], np.uint16), (41,)) for v in range(1 << 16)])
    assert len(np.unique(words[:, 0])) == len(np.unique(words[:, 1])) == 1 << 16


def test_two_flipped_sign_bits_do_not_cancel():
    x = draw((64, 64), "uint32")
    reference = as_hex(on_disk(x))
    seen = set()
    for where in range(1, 400):
        y = x.copy()
        y.flat[[0, where]] ^= np.uint32(1 << 31)
        seen.add(as_hex(on_disk(y)))
    assert len(seen) == 399 and reference not in seen


def test_swapped_rows_are_found():
    x = draw((8, 64), jnp.bfloat16)
    assert not np.array_equal(on_disk(x), on_disk(x[::-1]))


def test_coordinates_beyond_two_to_the_32_elements_matter():
    part = np.ones((1, 1, 1), np.float32)
    far = {as_hex(fingerprint_slice(part, (i, 1, 5))) for i in range(64)}  # 2^33 elements apart in the array
    assert len(far) == 64


def test_a_type_without_whole_bytes_is_refused_by_name():
    with pytest.raises(TypeError, match="float64"):
        fingerprint_slice(np.zeros(3), (0,))


def test_a_block_needs_a_start_on_every_axis():
    with pytest.raises(ValueError, match="rank 2"):
        fingerprint_slice(np.zeros((2, 2), np.float32), (0,))


def test_the_device_needs_no_memory_for_the_scrambled_elements():
    from dsv3_jax.training import fingerprint as module

    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    used = module._fingerprint.lower(x, np.uint32(0)).compile().memory_analysis().temp_size_in_bytes
    assert used < 1 << 16  # the array has 4 MiB
