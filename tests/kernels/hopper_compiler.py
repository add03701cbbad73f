"""Compiles Mosaic GPU kernels for an H200 that is not here, and reads what the compiler made of them.

It needs jax's CUDA 13 plug-in and a `ptxas` on the path, but neither a GPU nor its driver. Tests that use it
are named `test_hopper_compiles_...` and carry `needs_cuda_plugin`; run them with

    python -m pytest tests/kernels -k hopper_compiles
"""

import functools
import importlib.util
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tools.planning import hopper
from tools.planning.chips import CHIPS

needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
    reason="jax_cuda13_plugin and ptxas, the compiler for Hopper, are not both installed",
)


@dataclass(frozen=True)
class Kernel:
    """One compiled Mosaic GPU kernel."""

    registers: int  # of each thread at launch; warpgroups may then exchange theirs
    spills: int  # bytes that are stored to and loaded from local memory
    shared_memory: int  # bytes of a block
    complaints: tuple[str, ...]  # of ptxas: serialised wgmma, ignored setmaxnreg
    code: str  # PTX, and SASS where nvdisasm is at hand

    def uses(self, instruction: str) -> bool:
        """Whether a part of an instruction, such as `e4m3.e4m3`, appears in the code."""
        return instruction.lower() in self.code.lower()


def compile_kernels(f, *arguments) -> list[Kernel]:
    """The Mosaic GPU kernels in the program of `f`, compiled for one H200. Arguments: trees of shapes."""
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_device())  # noqa: E731
    fresh = lambda *arguments: f(*arguments)  # noqa: E731 - known to no cache of jax, so that all is compiled
    traced = jax.jit(fresh).trace(*jax.tree.map(place, arguments))
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder):
            traced.lower(lowering_platforms=("cuda",)).compile()
        kernels = [_read(path) for path in sorted(Path(folder).glob("*.ptxas"))]
    assert kernels, "The program has no Mosaic GPU kernel: the api gave the definition for these arguments."
    return kernels


def assert_fits(kernels: list[Kernel]) -> None:
    """Nothing spilled and ptxas had nothing to say; shared memory is checked by the compile itself."""
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.spills} bytes are spilled with {kernel.registers} registers."
        assert not kernel.complaints, "\n".join(kernel.complaints)


@functools.cache
def _device() -> NamedSharding:
    return NamedSharding(Mesh(np.array(hopper.devices(CHIPS["h200"], 1)), ("one",)), PartitionSpec())


def _read(report: Path) -> Kernel:
    """From the report of ptxas and the files of the same name beside it."""
    text = report.read_text()
    beside = lambda ending: report.with_suffix(ending)  # noqa: E731
    code = [path.read_text() for path in map(beside, (".ptx", ".sass")) if path.exists()]
    scratch = _sum(r"smem_scratch_bytes=(\d+)", beside(".resources.txt").read_text())
    return Kernel(
        registers=_sum(r"Used (\d+) registers", text),
        spills=_sum(r"frame, (\d+) bytes", text) + _sum(r"frame, .*?(\d+) bytes spill loads", text),
        shared_memory=scratch,
        # C7519 tells of a fence of registers, which waits for no product.
        complaints=tuple(
            line for line in text.splitlines() if re.search(r"\(C(?!7519)\d+\)|[Ww]arning", line)
        ),
        code="\n".join(code),
    )


def _sum(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"Nothing matches {pattern} in {text}"
    return sum(map(int, found))
