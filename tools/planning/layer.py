"""How long the parts of a routed layer take, measured or computed from peak figures, and what it keeps.

A device has one micro-batch of tokens. The report's parts (arXiv:2412.19437, section 3.2.1): attention and
feed-forward layer, each forward, backward for inputs and backward for weights, and two exchanges of tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.model import size
from tools.planning.chips import CHIPS, Chip


class Passes(NamedTuple):
    """Seconds of compute."""

    forward: float
    inputs: float  # gradients of inputs, with what is computed again for them
    weights: float  # gradients of weights


class LayerTimes(NamedTuple):
    """Seconds of a routed layer's parts for a micro-batch, each alone on the device, and of a pair."""

    attention: Passes
    mlp: Passes
    dispatch: float  # forward, and backward through the combination
    combine: float  # forward, and backward through the dispatch
    pair: float  # a forward and a whole backward that hide each other's communication
    resend: float = 0.0  # a dispatch of the forward that a backward repeats

    @property
    def compute(self) -> Passes:
        """Of attention and feed-forward layer."""
        return Passes(*(a + m for a, m in zip(self.attention, self.mlp, strict=True)))

    @property
    def alone(self) -> Passes:
        """With the communication that nothing hides."""
        forward, inputs, weights = self.compute
        exchanges = self.dispatch + self.combine
        return Passes(forward + exchanges, inputs + exchanges + self.resend, weights)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What numbers take in the products of attention and feed-forward layers, and between steps.

    Bytes a number include its share of scales: one of 4 bytes for 128 numbers, or for 128 x 128 of a weight.
    """

    flops: Callable[[Chip], float]  # peak FLOP/s of the products
    weight: float  # bytes as products read it
    dispatched: float  # bytes on the way to experts; back it is always BF16
    kept: float  # bytes of what products keep for their gradients
    kept_attention: float  # bytes of the attention output that is kept
    moment: float = 2.0  # bytes of each of Adam's two


# arXiv:2412.19437, sections 3.3.2 and 3.3.3; tests/ops/test_saved_activations.py finds these in programs.
BFLOAT16 = Precision(flops=attrgetter("bf16"), weight=2.0, dispatched=2.0, kept=2.0, kept_attention=2.0)
FP8 = Precision(
    flops=attrgetter("fp8"),
    weight=1 + 4 / 128**2,
    dispatched=1 + 4 / 128,
    kept=1 + 4 / 128,
    kept_attention=1.5 + 4 / 128,
)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak that programs reach; all at 1 give a bound that no program can beat."""

    products: float = 1.0
    attention: float = 1.0
    head: float = 1.0  # of BF16
    links: float = 1.0
    cores: float = 1.0  # that compute while others communicate
    imbalance: float = 1.0  # rows of the device with most, by those of a balanced load
    sent: float = 1.0  # bytes sent for each that is needed, where unused room is sent too


PEAK = Efficiency()


class Again(NamedTuple):
    """What a backward repeats of a forward beside norms and up-projections, which it always does."""

    products: float = 0.0  # of feed-forward layers; what these take is then not kept
    dispatch: float = 0.0


REPORT = Again()
# By the names of dsv3_jax/ops/recompute.py. Down projections, a third of the products, are not needed again.
RECOMPUTED = {"norms_and_up_projections": REPORT, "experts": Again(2 / 3, 1.0)}


def measured_h800() -> LayerTimes:
    """The report's own: 4096 tokens, 64 devices for the experts, FP8 dispatch, a load that is balanced.

    Compute and pair from DeepSeek's public training trace (deepseek-ai/profile-data, 4 layers, without
    traffic between stages). There exchanges run stretched beside compute, so what they take alone is from
    DeepEP's table: 51 GB/s of dispatch and 50 of combination, each node that a token visits counted.
    """
    ms = 1e-3 / 4
    c = Config()
    numbers = 4096 * visited(c, 8) * c.d_model
    return LayerTimes(
        attention=Passes(17.5 * ms, 37.4 * ms, 9.6 * ms),
        # Another 11.4 ms of the gradients of weights run on a second stream beside these.
        mlp=Passes(18.4 * ms, 21.2 * ms, 14.2 * ms),
        dispatch=numbers * FP8.dispatched / 51e9,
        combine=numbers * 2 / 50e9,
        pair=129 * ms,
    )


class Multiplications(NamedTuple):
    """Of a token in a forward pass."""

    linears: float  # of attention
    again: float  # the up-projections among them, which the backward computes again
    scores: float  # products of queries, keys and values over the visible half of the positions
    scores_backward: float  # in which queries meet keys again
    shared: float  # router and shared experts
    experts: float  # the chosen ones

    @classmethod
    @cache
    def of(cls, c: Config, length: int) -> "Multiplications":
        """Those of a routed layer, in sequences of a length."""
        query, value = c.d_nope + c.d_rope, c.d_value
        seen = c.heads * length / 2
        one = 3 * c.d_model * c.d_expert
        shared, experts = c.d_model * c.experts + c.shared_experts * one, c.top_k * one
        whole = size.forward_cost(c).routed - c.heads * (query + value) * c.max_length / 2
        again = c.heads * ((c.q_rank or 0) * query + c.kv_rank * (c.d_nope + value))
        return cls(
            whole - shared - experts,
            again,
            seen * (query + value),
            seen * (3 * query + 2 * value),
            shared,
            experts,
        )


@cache
def reached() -> Efficiency:
    """What the report's training reaches of an H800's peaks in whole layers, casts and norms included.

    Its trace against FLOPs, where 112 of 132 cores compute; products of attention are taken to run like those
    of the feed-forward layer. Head: nothing is published of it, so the best rate in BF16 that is, FlashMLA's.
    Links: DeepEP's 51 GB/s of 50 to 8 nodes, of which 7 are remote.
    """
    cores, measured, h800 = 112 / 132, measured_h800(), CHIPS["h800"]
    m = Multiplications.of(Config(), 4096)
    product, score = (2 * 4096 / peak for peak in (h800.fp8, h800.bf16))
    share = product * 3 * (m.shared + m.experts) / sum(measured.mlp)
    linears = product * (3 * m.linears + m.again) / share
    scores = score * (m.scores + m.scores_backward) / (sum(measured.attention) - linears)
    return Efficiency(
        products=share / cores,
        attention=scores / cores,
        head=660 / 989,
        links=51 * 7 / 8 / 50,
        cores=cores,
    )


def from_peaks(
    c: Config,
    expert: int,
    tokens: float,
    length: int,
    chip: Chip,
    precision: Precision,
    e: Efficiency,
    again: Again = REPORT,
) -> LayerTimes:
    """Times from FLOPs and bytes.

    Args:
        c: the model's sizes.
        expert: devices that share the experts.
        tokens: of a micro-batch on a device.
        length: positions of a sequence.
        chip: whose peaks these are.
        precision: of products and dispatch.
        e: the shares of the peaks that are reached.
        again: what is recomputed.
    """
    m = Multiplications.of(c, length)
    product = 2 * tokens / (precision.flops(chip) * e.products)
    score = 2 * tokens / (chip.bf16 * e.attention)
    linears = product * m.linears
    attention = Passes(
        linears + score * m.scores, linears + product * m.again + score * m.scores_backward, linears
    )
    products = product * (m.shared + e.imbalance * m.experts)
    mlp = Passes(products, products * (1 + again.products), products)
    numbers = tokens * c.d_model * e.sent * e.imbalance
    dispatch, combine = (
        exchange(c, expert, numbers * size, chip) / e.links for size in (precision.dispatched, 2.0)
    )
    alone = LayerTimes(attention, mlp, dispatch, combine, 0.0, again.dispatch * dispatch)
    together = max(sum(alone.compute) / e.cores, 2 * (dispatch + combine) + alone.resend)
    return alone._replace(pair=min(together, sum(alone.alone)))


def exchange(c: Config, expert: int, once: float, chip: Chip) -> float:
    """Seconds in which tokens go to the devices of their experts, at full bandwidth of the links.

    A token goes once to each domain that holds one of its experts, and there once to each device that does;
    the two ways are busy at the same time.

    Args:
        c: says how many experts a token chooses, and of how many groups.
        expert: devices that share the experts.
        once: bytes of a device's tokens.
        chip: whose links these are.
    """
    if expert == 1:
        return 0.0
    domains = max(1, expert // chip.domain)
    inside = expert // domains
    # In a torus the mean way counts the device itself, at no hops; a switch does not send to where it is.
    away = 1.0 if chip.dimensions else 1 - 1 / inside
    fast = once * visited(c, expert) * away / chip.everyone(inside)
    slow = once * visited(c, domains) * (1 - 1 / domains) / chip.slow_link
    return max(fast, slow)


def visited(c: Config, parts: int) -> float:
    """Of equal parts of the experts, how many hold one of a token's on average, if it chooses evenly.

    An upper bound where there are fewer parts than groups: a group that it chose may hold none.
    """
    if parts % c.groups == 0:  # only parts of the groups that it chose
        return _met(parts // c.groups * c.top_groups, c.experts // parts, c.top_k)
    by_choice = _met(parts, c.experts // parts, c.top_k)
    if c.groups % parts:
        return by_choice
    return min(by_choice, _met(parts, c.groups // parts, c.top_groups))


def _met(parts: int, size: int, drawn: int) -> float:
    """Parts of a size of which at least one thing is among those drawn."""
    return parts * (1 - math.comb((parts - 1) * size, drawn) / math.comb(parts * size, drawn))


def kept_bytes(c: Config, precision: Precision, again: Again = REPORT) -> float:
    """Bytes that a routed layer keeps of a token for its backward pass.

    Alignment of experts' rows adds some; see tests/ops/test_saved_activations.py.
    """
    token = 2 * (2 * c.d_model + (c.q_rank or 0) + c.kv_rank + c.d_rope)  # input, residual, latents
    token += precision.kept_attention * c.heads * c.d_value + 4 * c.heads  # and its normalisers
    if again.products:
        return token
    hidden = precision.kept * 2 * c.d_expert
    return token + c.shared_experts * hidden + c.top_k * (precision.kept * c.d_model + hidden)
