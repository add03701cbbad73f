"""What accelerators can do, by their makers' public figures, and the names of machines built of them."""

import math
import re
from dataclasses import dataclass, replace

from dsv3_jax.training.metrics import peak_flops
from experiments.records import Refused, nearest


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them; its links reach all devices of a domain fast, and others slowly."""

    kind: str
    bf16: float  # dense FLOP/s
    fp8: float  # dense FLOP/s; those of BF16 where products in FP8 are no faster
    memory_bytes: float
    memory_bandwidth: float  # bytes a second
    fast_link: float  # bytes a second that a device sends in its domain, over all its links together
    slow_link: float  # bytes a second that a device sends to other domains
    domain: int  # devices: of a node of GPUs, of the largest slice of TPUs
    dimensions: int = 0  # of the torus that a domain is; 0 where a switch joins its devices
    devices: int = 1  # of a chip

    def everyone(self, devices: int) -> float:
        """Bytes a second that each of these devices of a domain can send to all of them at the same time.

        In a torus they are taken as a box with sides of powers of two. Each dimension has a share of the
        links, and what goes several hops takes one for each: a quarter of the longest side on average. A side
        of two has one link between, and is no faster than a ring of four.
        """
        if not self.dimensions:
            return self.fast_link
        side = 2 ** math.ceil(math.log2(max(1, devices / self.devices)) / self.dimensions)
        return self.fast_link / self.dimensions / max(1, side / 4)

    @property
    def neighbour(self) -> float:
        """Bytes a second that a device can send to one other that is near; in a torus over one link."""
        return self.fast_link / (2 * self.dimensions or 1)


def _peak(kind: str) -> float:
    flops = peak_flops(kind)
    assert flops is not None, kind
    return flops


# TPUs: the tables of docs.cloud.google.com/tpu/docs/v5p, /v6e and /tpu7x. Their ICI bandwidth is that of both
# directions together, and memory what is left beside the runtime. Products in FP8 run at the speed of BF16
# before TPU7x. GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM, FP8 with sparsity halved, NVLink 900 GB/s
# in both directions together; one InfiniBand card of 400 Gb/s a GPU. The H800 is an H100 whose NVLink carries
# less: 160 GB/s are what arXiv:2412.19437, section 3.2.2, reckons with.
_GIB = 2**30
_V5P = Chip(
    kind="v5p",
    bf16=_peak("TPU v5p"),
    fp8=459e12,
    memory_bytes=95 * _GIB,
    memory_bandwidth=2765e9,
    fast_link=600e9,
    slow_link=6.25e9,
    domain=6144,
    dimensions=3,
)
_V6E = Chip(
    kind="v6e",
    bf16=_peak("TPU v6e"),
    fp8=918e12,
    memory_bytes=32 * _GIB,
    memory_bandwidth=1638e9,
    fast_link=400e9,
    slow_link=12.5e9,
    domain=256,
    dimensions=2,
)
_TPU7X = Chip(
    kind="tpu7x",
    bf16=_peak("TPU7x"),
    fp8=2307e12,
    memory_bytes=96 * _GIB,
    memory_bandwidth=3690e9,
    fast_link=300e9,
    slow_link=6.25e9,
    domain=2 * 9216,
    dimensions=3,
    devices=2,
)
_H100 = Chip(
    kind="h100",
    bf16=_peak("NVIDIA H100"),
    fp8=1979e12,
    memory_bytes=80e9,
    memory_bandwidth=3350e9,
    fast_link=450e9,
    slow_link=50e9,
    domain=8,
)
_H200 = replace(_H100, kind="h200", memory_bytes=141e9, memory_bandwidth=4800e9)
_H800 = replace(_H100, kind="h800", fast_link=160e9)
CHIPS = {chip.kind: chip for chip in (_V5P, _V6E, _TPU7X, _H100, _H200, _H800)}


def topology(text: str) -> tuple[Chip, int]:
    """The chip and the number of JAX devices of a machine's name, such as v5p:8x8x16 or h800:2048.

    Names of TPUs are those that libtpu knows: chips along each dimension of a slice.

    Raises:
        Refused: if there is no such chip, or no such slice of it.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise Refused(
            f"{text!r} is no machine of a known chip{nearest(kind, list(CHIPS))}: choose one of "
            f"{', '.join(CHIPS)}, and its number or shape, as in h800:2048 or v5p:8x8x16."
        )
    chip = CHIPS[kind]
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if len(sides) != (chip.dimensions or 1) or not all(sides):
        wanted = f"{chip.dimensions} sides" if chip.dimensions else "a number of devices"
        example = "x".join("4" * chip.dimensions) or "64"
        raise Refused(f"{text!r} has no shape of {kind}: give {wanted} above 0, as in {kind}:{example}.")
    devices = math.prod(sides) * chip.devices
    if chip.dimensions and devices > chip.domain:
        raise Refused(
            f"{text!r} is {math.prod(sides)} chips, but a slice of {kind} has at most "
            f"{chip.domain // chip.devices}: choose a smaller one."
        )
    return chip, devices
