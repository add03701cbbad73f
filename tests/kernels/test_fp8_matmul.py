"""A scaled product is the product of the numbers that its operands stand for."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fp8_matmul, quantize
from pallas_kernels.fp8_matmul import cases, gpu, tpu, tuning
from pallas_kernels.hopper_tiles import Tiles
from tests.kernels import harness
from tests.kernels.harness import difference, hard, numbers, relative_error
from tests.kernels.hopper_compiler import assert_fits, compile_kernels, needs_cuda_plugin

FP32_SUMS = 1e-6  # of FP32 rounding at most; about 2^-24 sqrt(K) is seen


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 700), st.sampled_from([(128, 128), (1, 128)]))
def test_products_of_any_shape(m, n, k, tile):
    x, w = quantize.quantize(hard("normal", m, k)), quantize.quantize(hard("edges", n, k), tile)
    got = fp8_matmul.matmul(x, w, dtype=jnp.float32)
    want = numbers(x) @ numbers(w).T
    bound = FP32_SUMS * (np.abs(numbers(x)) @ np.abs(numbers(w)).T)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound + 1e-30).all()


@pytest.mark.parametrize("name", ["normal", "one huge", "tiny", "edges", "some zero tiles"])
def test_the_product_is_close_to_that_of_what_was_quantised(name):
    x, w = hard(name, 128, 7168), hard("normal", 96, 7168)
    got = fp8_matmul.matmul(quantize.quantize(x), quantize.quantize(w, (128, 128)))
    assert difference(got, x.astype(np.float64) @ w.T.astype(np.float64)) < 1e-3


def test_sums_go_on_from_those_given():
    x, w = quantize.quantize(hard("normal", 40, 300)), quantize.quantize(hard("normal", 50, 300))
    into = hard("normal", 40, 50)
    got = fp8_matmul.matmul(x, w, into, dtype=jnp.float32)
    assert relative_error(got, numbers(x) @ numbers(w).T + into) < FP32_SUMS


def test_nan_reaches_its_row_alone():
    x = quantize.quantize(hard("nan", 8, 256))
    got = np.asarray(fp8_matmul.matmul(x, quantize.quantize(hard("normal", 16, 256))), np.float32)
    assert np.isnan(got[4]).all() and np.isfinite(np.delete(got, 4, 0)).all()


def test_operands_that_do_not_fit_are_refused():
    x, w = quantize.quantize(hard("normal", 8, 256)), quantize.quantize(hard("normal", 8, 200))
    with pytest.raises(ValueError, match="same number of columns"):
        fp8_matmul.matmul(x, w)
    with pytest.raises(ValueError, match="tiles of one row in the first"):
        fp8_matmul.matmul(quantize.quantize(hard("normal", 8, 256), (128, 128)), x)


# Odd columns, depths that end inside a group, rows that end inside a tile; and sums to go on from (whole
# tiles: the interpreter of TPUs returns a reused array padded to them).
ODD = [(200, 136, 576, 128), (130, 320, 336, 128), (256, 384, 300, 1)]
SMALL_TPU, SMALL_HOPPER = tuning.TpuTiles(128, 128, 256), Tiles(64, 3, 2, 2)


def check(kernel, m, n, k, tile):
    x, w = quantize.quantize(hard("normal", m, k)), quantize.quantize(hard("edges", n, k), (tile, 128))
    into = hard("normal", m, n) if tile == 1 else None
    got = np.asarray(kernel(x, w, into, jnp.float32))
    want = numbers(x) @ numbers(w).T + (0 if into is None else into)
    assert relative_error(got, want) < FP32_SUMS


@pytest.mark.parametrize("case", ODD, ids=str)
@harness.interprets
def test_the_tpu_kernel_is_the_definition(case):
    check(lambda *a: tpu.matmul(*a, tiles=SMALL_TPU, interpret=harness.on_tpu()), *case)


@pytest.mark.parametrize("case", [(200, 136, 576, 128), (130, 320, 336, 128), (136, 200, 304, 1)], ids=str)
@harness.interprets
def test_the_hopper_kernel_is_the_definition(case):
    check(lambda *a: gpu.matmul(*a, tiles=SMALL_HOPPER, sms=2, interpret=harness.on_hopper()), *case)


@harness.interprets
def test_groups_may_be_wider_than_128_on_tpu():
    x, w = (quantize.quantize(hard("normal", n, 1024), (1, 512)) for n in (64, 128))
    got = tpu.matmul(x, w, dtype=jnp.float32, interpret=harness.on_tpu())
    assert relative_error(got, numbers(x) @ numbers(w).T) < FP32_SUMS


def abstract(case):
    x = harness.scaled_shape(case.m, case.k, tile=(1, 128))
    w = harness.scaled_shape(case.n, case.k, tile=(case.tile, 128))
    return (x, w) if case.tile == 128 else (x, w, harness.shape(case.m, case.n, dtype=jnp.float32))


def result(case):
    return jnp.bfloat16 if case.tile == 128 else jnp.float32


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("case", cases.DISTINCT, ids=str)
@harness.needs_libtpu
def test_the_tpu_kernel_compiles_at_full_size(case, chip):
    harness.compile_for(chip, lambda *a: tpu.matmul(*a, dtype=result(case)), *abstract(case))


@pytest.mark.parametrize("case", [*cases.FORWARD, *cases.DGRAD, *cases.WGRAD, *cases.DECODE], ids=str)
@needs_cuda_plugin
def test_hopper_compiles_the_kernel_without_spills(case):
    kernels = compile_kernels(lambda *a: gpu.matmul(*a, dtype=result(case)), *abstract(case))
    assert_fits(kernels)
    assert all(kernel.uses("e4m3.e4m3") for kernel in kernels)


_COMPILE = """
import jax.numpy as jnp
from pallas_kernels.fp8_matmul import tpu
from tests.kernels import harness
x = harness.scaled_shape(256, 512, tile=(1, 128))
harness.compile_for("tpu7x", tpu.matmul, x, harness.scaled_shape(256, 512, tile=(128, 128)))
"""


@harness.needs_libtpu
def test_tpu7x_multiplies_e4m3_itself(tmp_path):
    # The compiler reads its flags when it is loaded, so it is in a process of its own.
    environment = os.environ | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path}"}
    subprocess.run([sys.executable, "-c", _COMPILE], env=environment, check=True, capture_output=True)
    bundles = "".join(path.read_text() for path in tmp_path.glob("*final_bundles.txt"))
    assert "f8e4m3fn" in "".join(line for line in bundles.splitlines() if "vmatmul" in line)
