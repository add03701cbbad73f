"""What `tools.bench_kernels` times of products and casts: our kernel for each shape, rivals, the truth."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import fp8_matmul, grouped_matmul, quantize
from pallas_kernels.fp8_matmul.cases import Case as Dense
from pallas_kernels.grouped_matmul.cases import Case as Grouped
from pallas_kernels.quantize import reference
from pallas_kernels.scaled import Scaled, dequantize


class Contender(NamedTuple):
    """One way to do the work. Only `run` is timed."""

    prepare: Callable[..., tuple]  # from a benchmark's operands
    run: Callable[..., Any]


class Benchmark(NamedTuple):
    """One shape of one operation."""

    name: str
    operands: Callable[[Array], tuple]  # random ones from a key
    ours: Contender
    xla: dict[str, Contender]  # rivals that are jax functions
    torch: dict[str, Contender]  # rivals on torch's tensors
    truth: Callable[..., Array]  # of the arguments of `ours.run`, in FP32
    compared: Callable[[Any], Array]  # what of our result the truth is of
    flops: float  # of products; zero where memory alone counts
    bytes: float  # that must be read and written at least
    fp8: float  # of the FLOPs, the part that is done in FP8


def same(*operands: Any) -> tuple:
    """Of contenders that take the operands as they are."""
    return operands


def whole(result: Any) -> Array:
    """Of benchmarks that compare all there is."""
    return result


def normal(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Random operands in BF16."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)]


def _size(*arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def dense(cases: Iterable[Dense]) -> list[Benchmark]:
    """FP8 products; rivals multiply in BF16, or in FP8 with one scale for each row."""
    return [_dense(case) for case in cases]


def _dense(case: Dense) -> Benchmark:
    tile, dtype = (case.tile, 128), jnp.bfloat16 if case.tile == 128 else jnp.float32

    def scaled_rows(x, w):
        import torch

        def quantised(a):
            scales = a.abs().amax(1, keepdim=True).float() / 448
            return (a / scales).to(torch.float8_e4m3fn), scales

        (x, x_scales), (w, w_scales) = quantised(x), quantised(w)
        return x, w.t(), x_scales, w_scales.t()

    def scaled_mm(x, w, x_scales, w_scales):
        import torch

        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x, w, scale_a=x_scales, scale_b=w_scales, out_dtype=torch.bfloat16
        )

    return Benchmark(
        name=f"fp8_matmul {case.m} x {case.n} x {case.k}, scales of w by {case.tile} rows",
        operands=lambda key: tuple(normal(key, (case.m, case.k), (case.n, case.k))),
        ours=Contender(
            lambda x, w: (quantize.quantize(x), quantize.quantize(w, tile)),
            partial(fp8_matmul.matmul, dtype=dtype),
        ),
        xla={
            "BF16 product": Contender(same, lambda x, w: jnp.matmul(x, w.T)),
            "jax.nn.scaled_matmul": Contender(lambda x, w: (x[None], w[None]), _microscaled),
        },
        torch={
            "BF16 product": Contender(same, lambda x, w: x @ w.t()),
            "_scaled_mm, scales by row": Contender(scaled_rows, scaled_mm),
        },
        truth=lambda x, w: jnp.matmul(dequantize(x), dequantize(w).T, precision="highest"),
        compared=whole,
        flops=2.0 * case.m * case.n * case.k,
        bytes=case.m * case.k + case.n * case.k + case.m * case.n * jnp.dtype(dtype).itemsize,
        fp8=1.0,
    )


def _microscaled(x: Array, w: Array) -> Array:
    """MXFP8: cuDNN multiplies; quantising its operands is part of the call."""
    config = jax.nn.get_scaled_dot_general_config("mxfp8")
    contract = (((2,), (2,)), ((0,), (0,)))
    return jax.nn.scaled_dot_general(x, w, contract, configs=[config] * 3, implementation="cudnn")


def grouped(cases: dict[str, Grouped]) -> list[Benchmark]:
    """Forward products in BF16 and FP8, and the FP8 gradient of weights, of groups of one size."""
    of_each = (_grouped_bfloat16, _grouped_fp8, _grouped_gradient)
    return [make(name, case) for make in of_each for name, case in cases.items()]


def _sizes(case: Grouped) -> Array:
    return jnp.full(case.groups, case.rows // case.groups, jnp.int32)


def _rows_and_matrices(case: Grouped, key: Array) -> tuple:
    x, w = normal(key, (case.rows, case.depth), (case.groups, case.depth, case.columns))
    return x, w, _sizes(case)


def _grouped_flops(case: Grouped) -> float:
    return 2.0 * case.rows * case.depth * case.columns


_RAGGED_DOT = {"lax.ragged_dot in BF16": Contender(same, jax.lax.ragged_dot)}


def _grouped_bfloat16(name: str, case: Grouped) -> Benchmark:
    exact = partial(jax.lax.ragged_dot, precision="highest", preferred_element_type=jnp.float32)
    read = case.rows * case.depth + case.groups * case.depth * case.columns
    return Benchmark(
        name=f"grouped_matmul in BF16, {name}",
        operands=partial(_rows_and_matrices, case),
        ours=Contender(same, partial(grouped_matmul.matmul, alignment=128)),
        xla=_RAGGED_DOT,
        torch={},
        truth=exact,
        compared=whole,
        flops=_grouped_flops(case),
        bytes=2.0 * (read + case.rows * case.columns),
        fp8=0.0,
    )


def _grouped_fp8(name: str, case: Grouped) -> Benchmark:
    def quantised(x, w, sizes):
        return quantize.quantize(x), quantize.quantize(w.mT, (128, 128)), sizes

    def truth(x, w, sizes):
        return jax.lax.ragged_dot(dequantize(x), dequantize(w).mT, sizes, precision="highest")

    read = case.rows * case.depth + case.groups * case.depth * case.columns
    return Benchmark(
        name=f"grouped_matmul in FP8, {name}",
        operands=partial(_rows_and_matrices, case),
        ours=Contender(quantised, partial(grouped_matmul.fp8_matmul, alignment=128)),
        xla=_RAGGED_DOT,
        torch={},
        truth=truth,
        compared=whole,
        flops=_grouped_flops(case),
        bytes=read + 2.0 * case.rows * case.columns,
        fp8=1.0,
    )


def _grouped_gradient(name: str, case: Grouped) -> Benchmark:
    def quantised(x, y, sizes):
        return quantize.transposed(x), quantize.transposed(y), sizes

    def by_group(x, y, sizes):
        each = lambda a: a.reshape(len(sizes), -1, a.shape[1])  # noqa: E731 - groups are of one size
        return jnp.einsum("gmi,gmo->gio", each(x), each(y), preferred_element_type=jnp.float32)

    def truth(x, y, sizes):
        with jax.default_matmul_precision("highest"):
            return by_group(dequantize(x).T, dequantize(y).T, sizes)

    read = case.rows * (case.depth + case.columns)
    return Benchmark(
        name=f"grouped_matmul, FP8 gradient of weights, {name}",
        operands=lambda key: (
            *normal(key, (case.rows, case.depth), (case.rows, case.columns)),
            _sizes(case),
        ),
        ours=Contender(quantised, grouped_matmul.fp8_weight_gradient),
        xla={"batched BF16 product": Contender(same, by_group)},
        torch={},
        truth=truth,
        compared=whole,
        flops=_grouped_flops(case),
        bytes=read + 4.0 * case.groups * case.depth * case.columns,
        fp8=1.0,
    )


def quantised(matrices: list[tuple[int, int]], activations: list[tuple[int, int]]) -> list[Benchmark]:
    """Casts by row, in squares and along tokens, and SwiGLU with them; the rival is XLA's own program."""

    def one(name, rows, columns, ours, definition):
        shape = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
        return Benchmark(
            name=f"{name} of {rows} x {columns}",
            operands=lambda key: tuple(normal(key, (rows, columns))),
            ours=Contender(same, ours),
            xla={"XLA's program": Contender(same, definition)},
            torch={},
            truth=lambda x: _numbers(definition(x)),
            compared=_numbers,
            flops=0.0,
            bytes=_size(shape, jax.eval_shape(definition, shape)),
            fp8=0.0,
        )

    squares = lambda f: lambda x: f(x, (128, 128))  # noqa: E731
    benchmarks = []
    for rows, columns in matrices:
        benchmarks += [
            one("quantize by row", rows, columns, quantize.quantize, reference.quantize),
            one(
                "quantize in squares", rows, columns, squares(quantize.quantize), squares(reference.quantize)
            ),
            one("quantize along tokens", rows, columns, quantize.transposed, reference.transposed),
            one("pack in 12 bits", rows, columns, quantize.pack, reference.pack),
        ]
    for rows, width in activations:
        on = lambda f: lambda hidden: f(hidden, None)  # noqa: E731
        benchmarks += [
            one("swiglu and quantize", rows, 2 * width, on(quantize.swiglu), on(reference.swiglu)),
            one(
                "swiglu and quantize along tokens",
                *(rows, 2 * width),
                on(quantize.swiglu_transposed),
                on(reference.swiglu_transposed),
            ),
        ]
    return benchmarks


def _numbers(result: Any) -> Array:
    return dequantize(result) if isinstance(result, Scaled) else quantize.unpack(*result)
