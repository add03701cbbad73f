"""`python -m tools.bench_kernels [--only=TEXT] [--device-json=FILE]`: every kernel beside its rivals, on this
device.

Each shape is checked first, against FP32, and only what is right is timed. Ours, XLA's own and torch's take
turns on the same inputs, several sets of them, so that no cache holds what comes next; medians are compared.
Fractions are of a large BF16 product and a large copy measured in the same run, and of the data sheet. On a
CPU small shapes run on what our kernels fall back to there: that shows that it works, not how fast kernels
are.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv3_jax.training.metrics import peak_flops, write_atomically
from pallas_kernels.fp8_matmul import cases as dense_cases
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.mla_attention import cases as attention_cases
from pallas_kernels.mla_decode import cases as decode_cases
from pallas_kernels.quantize import cases as quantize_cases
from tools import attention_benchmarks, kernel_benchmarks
from tools.kernel_benchmarks import Benchmark, Contender

_ONLY = flags.DEFINE_string("only", "", "Times only shapes whose name has this text.")
_JSON = flags.DEFINE_string("device-json", None, "Where to write what is printed, as JSON.")

ACCEPTED = 1e-3  # of 1 - 2<x,y>/(<x,x> + <y,y>), as DeepGEMM's tests accept
_TURNS, _LEAST_SECONDS = 15, 0.02  # of timing, and that each turn takes at least
_CACHE = 256 * 2**20  # bytes, more than any of the caches that inputs must not stay in
_MOST_SETS = 8
# GB/s of memory on data sheets, and how many times the BF16 rate that of FP8 is.
_SHEETS = {
    "NVIDIA H100 PCIe": (2000, 2),
    "NVIDIA H100 NVL": (3900, 2),
    "NVIDIA H100": (3350, 2),
    "NVIDIA H200": (4800, 2),
    "NVIDIA B200": (8000, 2),
    "TPU v5 lite": (819, 1),
    "TPU v5": (2765, 1),
    "TPU v6 lite": (1640, 1),
    "TPU7x": (3690, 2),  # of one of the two cores that are a device each
}


class Ceilings(NamedTuple):
    """What the device reaches at its best, and what its data sheet says (None where there is none)."""

    bf16: float  # FLOP/s
    copy: float  # bytes/s, read and written
    sheet_bf16: float | None
    sheet_fp8: float | None
    sheet_copy: float | None


class Row(NamedTuple):
    """What came of one shape. Seconds are medians of one call; a contender without has a note instead."""

    name: str
    error: float  # DeepGEMM's measure; above ACCEPTED nothing is timed
    ours: float | None
    rivals: dict[str, float]
    notes: dict[str, str]
    flops: float
    bytes: float
    fp8: float
    xla: tuple[str, ...]  # names of rivals that XLA compiles

    @property
    def ratio(self) -> float | None:
        """How many times the speed of XLA's best we have."""
        times = [self.rivals[name] for name in self.xla if name in self.rivals]
        return min(times) / self.ours if times and self.ours else None


def main(argv: list[str]) -> None:
    """Checks, times, prints and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; choose shapes with --only=TEXT.")
    on_cpu = jax.default_backend() == "cpu"
    benchmarks = [b for b in (small() if on_cpu else full()) if _ONLY.value in b.name]
    if not benchmarks:
        raise app.UsageError(f"--only={_ONLY.value} is part of no name: leave it out to see all of them.")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}, {date.today()}")
    if on_cpu:
        print("No accelerator: small shapes on the CPU's fallbacks, which say nothing about the kernels.")
    ceilings = measure_ceilings(*((1024, 1 << 26) if on_cpu else (8192, 1 << 30)))
    print(f"BF16 product {ceilings.bf16 / 1e12:.2f} TFLOP/s, copy {ceilings.copy / 1e9:.1f} GB/s\n")
    rows = []
    for benchmark in benchmarks:
        rows.append(measure(benchmark))
        print("\n".join(lines(rows[-1], ceilings)), flush=True)
    mean = geometric_mean([row.ratio for row in rows if row.ratio])
    print(f"\nGeometric mean over {len(rows)} shapes: {mean:.3f} times the speed of XLA's best.")
    if _JSON.value:
        found = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "date": str(date.today()),
            "ceilings": ceilings._asdict(),
            "rows": [row._asdict() | {"ratio": row.ratio} for row in rows],
            "geometric_mean": mean if math.isfinite(mean) else None,
        }
        write_atomically(Path(_JSON.value), json.dumps(found, indent=1).encode())
    if wrong := [row.name for row in rows if not row.error < ACCEPTED]:
        raise SystemExit(f"{len(wrong)} of {len(rows)} shapes came out wrong: {'; '.join(wrong)}.")


def measure(benchmark: Benchmark) -> Row:
    """Checks ours and, if it is right, times it in turns with its rivals."""
    first = benchmark.operands(jax.random.key(0))
    notes: dict[str, str] = {}
    error = _error(benchmark, first)
    programs: dict[str, Callable[[], Any]] = {}
    sets = [first]
    if error < ACCEPTED:
        many = min(_MOST_SETS, max(2, math.ceil(_CACHE / benchmark.bytes)))
        sets += [benchmark.operands(jax.random.key(seed)) for seed in range(1, many)]
        contenders = {"ours": (_on_xla, benchmark.ours)}
        contenders |= {f"XLA: {name}": (_on_xla, rival) for name, rival in benchmark.xla.items()}
        contenders |= {f"torch: {name}": (_on_torch, rival) for name, rival in benchmark.torch.items()}
        for name, (build, contender) in contenders.items():
            try:
                programs[name] = build(contender, sets)
                programs[name]()
            except (
                Exception
            ) as refusal:  # of a rival that this machine lacks, or that does not take the shape
                programs.pop(name, None)
                notes[name] = _brief(refusal)
    else:
        notes["ours"] = "wrong"
    seconds = {name: time_ / len(sets) for name, time_ in in_turns(programs).items()}
    return Row(
        name=benchmark.name,
        error=error,
        ours=seconds.pop("ours", None),
        rivals=seconds,
        notes=notes,
        flops=benchmark.flops,
        bytes=benchmark.bytes,
        fp8=benchmark.fp8,
        xla=tuple(f"XLA: {name}" for name in benchmark.xla),
    )


def in_turns(programs: dict[str, Callable[[], Any]], turns: int = _TURNS) -> dict[str, float]:
    """Median seconds of each program, all of them timed once in every turn."""
    repeats = {name: max(1, math.ceil(_LEAST_SECONDS / _once(run, 1))) for name, run in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(turns):
        for name, run in programs.items():
            times[name].append(_once(run, repeats[name]) / repeats[name])
    return {name: statistics.median(found) for name, found in times.items()}


def geometric_mean(ratios: Sequence[float]) -> float:
    """NaN of none."""
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan


def measure_ceilings(side: int, size: int) -> Ceilings:
    """By a square BF16 product and a copy of so many bytes."""
    a = jnp.ones((side, side), jnp.bfloat16) * jax.random.normal(jax.random.key(0), (side, 1), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (size // 4,), jnp.float32)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda b: b * 1.5)
    seconds = in_turns(
        {
            "product": lambda: jax.block_until_ready(multiply(a, a)),
            "copy": lambda: jax.block_until_ready(copy(b)),
        }
    )
    device = jax.devices()[0]
    sheet = peak_flops(device.device_kind)
    memory, fp8 = next(
        (found for kind, found in _SHEETS.items() if device.device_kind.startswith(kind)), (None, 1)
    )
    return Ceilings(
        bf16=2.0 * side**3 / seconds["product"],
        copy=2.0 * size / seconds["copy"],
        sheet_bf16=sheet,
        sheet_fp8=sheet and sheet * fp8,
        sheet_copy=memory and memory * 1e9,
    )


def lines(row: Row, ceilings: Ceilings) -> list[str]:
    """The name, then a line for each contender."""
    out = [f"{row.name}   (difference {row.error:.1e})"]
    times = ({"ours": row.ours} if row.ours else {}) | row.rivals
    for name, seconds in times.items():
        ratio = f"{seconds / row.ours:6.2f}x" if row.ours and name != "ours" else "       "
        out.append(f"  {name:40s} {seconds * 1e6:10.1f} us {_rate(row, seconds, ceilings)} {ratio}")
    return out + [f"  {name:40s} {note}" for name, note in row.notes.items()]


def _rate(row: Row, seconds: float, ceilings: Ceilings) -> str:
    """TFLOP/s or GB/s, and of which ceiling that is how much."""
    if row.flops / ceilings.bf16 > row.bytes / ceilings.copy:
        rate, unit, ceiling = row.flops / seconds, 1e12, ceilings.bf16
        sheet, text = ceilings.sheet_fp8 if row.fp8 else ceilings.sheet_bf16, "TFLOP/s"
    else:
        rate, unit, ceiling = row.bytes / seconds, 1e9, ceilings.copy
        sheet, text = ceilings.sheet_copy, "GB/s"
    of_sheet = f", {rate / sheet:4.0%} of data sheet" if sheet else ""
    return f"{rate / unit:9.2f} {text:7s} ({rate / ceiling:4.0%} of measured{of_sheet})"


def _error(benchmark: Benchmark, operands: tuple) -> float:
    arguments = benchmark.ours.prepare(*operands)
    got = benchmark.compared(jax.jit(benchmark.ours.run)(*arguments)).astype(jnp.float32)
    want = jax.jit(benchmark.truth)(*arguments).astype(jnp.float32)
    difference = 1 - 2 * jnp.vdot(got, want) / (jnp.vdot(got, got) + jnp.vdot(want, want))
    return abs(float(difference))  # NaN stays NaN, and is not accepted


def _on_xla(contender: Contender, sets: list[tuple]) -> Callable[[], Any]:
    """One program for all sets, so that the host is asked once."""
    arguments = [jax.block_until_ready(contender.prepare(*operands)) for operands in sets]
    program = jax.jit(lambda sets: [contender.run(*each) for each in sets])
    return lambda: jax.block_until_ready(program(arguments))


def _on_torch(contender: Contender, sets: list[tuple]) -> Callable[[], Any]:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    arguments = [contender.prepare(*(torch.from_dlpack(x) for x in operands)) for operands in sets]

    def run():
        for each in arguments:
            contender.run(*each)
        torch.cuda.synchronize()

    return run


def _once(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def _brief(refusal: Exception) -> str:
    first = str(refusal).strip().partition("\n")[0]
    return f"not run: {type(refusal).__name__}: {first}"[:110]


def full() -> list[Benchmark]:
    """The shapes of DeepSeek-V3's training, from each kernel's cases."""
    dense = dict.fromkeys([*dense_cases.FORWARD, *dense_cases.DGRAD, *dense_cases.WGRAD])
    activations = [(rows, width) for rows, width, _ in quantize_cases.ACTIVATIONS]
    return [
        *kernel_benchmarks.dense(dense),
        *kernel_benchmarks.grouped(grouped_cases.FULL),
        *kernel_benchmarks.quantised(quantize_cases.MATRICES, activations),
        *attention_benchmarks.attention(attention_cases.FULL),
        *attention_benchmarks.decode(decode_cases.FULL),
    ]


def small() -> list[Benchmark]:
    """Shapes that a CPU is done with in a minute."""
    groups = {"4 groups": grouped_cases.Case(rows=1024, groups=4, depth=512, columns=256)}
    sequences = {"4 sequences": decode_cases.Case(batch=4, heads=8, tokens=1024)}
    return [
        *kernel_benchmarks.dense([dense_cases.Case(256, 320, 1024), dense_cases.Case(256, 320, 512, 1)]),
        *kernel_benchmarks.grouped(groups),
        *kernel_benchmarks.quantised([(512, 1024)], [(512, 512)]),
        *attention_benchmarks.attention({"512 tokens": attention_cases.Case(length=512, heads=4)}),
        *attention_benchmarks.decode(sequences),
    ]


if __name__ == "__main__":
    app.run(main)
