"""What `tools.bench_kernels` times of attention: our kernel for each shape, its rivals, and the truth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import mla_attention, mla_decode
from pallas_kernels.mla_attention.cases import Case
from pallas_kernels.mla_decode import reference
from pallas_kernels.mla_decode.cases import Case as Decode
from tools.kernel_benchmarks import Benchmark, Contender, normal, same


def attention(cases: dict[str, Case]) -> list[Benchmark]:
    """One document a row: forward alone, and with the backward pass."""
    return [make(name, case) for make in (_forward, _with_gradients) for name, case in cases.items()]


def _forward(name: str, case: Case) -> Benchmark:
    b, s, h, x, v = case.batch, case.length, case.heads, case.width, case.value_width
    scale = x**-0.5

    def torch_attention(q, k, v):
        import torch

        heads_first = [a.transpose(1, 2) for a in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)

    return Benchmark(
        name=f"mla_attention, {name}",
        operands=lambda key: tuple(normal(key, (b, s, h, x), (b, s, h, x), (b, s, h, v))),
        ours=Contender(
            lambda *qkv: (*qkv, jnp.ones((b, s), jnp.int32)),
            lambda q, k, v, segments: mla_attention.attention(q, k, v, scale, segments),
        ),
        xla={
            "cuDNN": Contender(same, partial(_padded, scale=scale, implementation="cudnn")),
            "dot_product_attention": Contender(same, partial(_padded, scale=scale)),
        },
        torch={"scaled_dot_product_attention": Contender(same, torch_attention)},
        truth=lambda q, k, v, _: _true(q, k, v, scale),
        compared=lambda y: y[:, :, 0],
        flops=1.0 * b * h * s * s * (x + v),  # of the half of the scores that is not masked
        bytes=2.0 * b * s * h * 2 * (x + v),
        fp8=0.0,
    )


def _with_gradients(name: str, case: Case) -> Benchmark:
    """The backward pass has 2.5 times the products of the forward one."""
    forward = _forward(name, case)

    def both(run):
        return lambda q, k, v, g, *rest: jax.vjp(lambda *qkv: run(*qkv, *rest), q, k, v)[1](g)

    def operands(key):
        first, second = jax.random.split(key)
        g = normal(second, (case.batch, case.length, case.heads, case.value_width))
        return *forward.operands(first), *g

    def truth(q, k, v, g, _):
        _, pull = jax.vjp(partial(_true, scale=case.width**-0.5), q, k, v)
        return _first_head(pull(g[:, :, 0].astype(jnp.float32)))

    return forward._replace(
        name=f"mla_attention with gradients, {name}",
        operands=operands,
        ours=Contender(lambda *qkvg: (*qkvg, jnp.ones(qkvg[0].shape[:2], jnp.int32)), both(forward.ours.run)),
        xla={rival: Contender(same, both(contender.run)) for rival, contender in forward.xla.items()},
        torch={},
        truth=truth,
        compared=_first_head,
        flops=3.5 * forward.flops,
        bytes=3.0 * forward.bytes,
    )


def _padded(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """JAX's own attention, which takes values of the width of keys alone."""
    width = v.shape[3]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - width)))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)[..., :width]


def _true(
    q: Float[Array, "B S H X"], k: Float[Array, "B S H X"], v: Float[Array, "B S H V"], scale: float
) -> Float32[Array, "B S V"]:
    """Of the first head: scores of all would fill the memory."""
    q, k, v = (a[:, :, 0].astype(jnp.float32) for a in (q, k, v))
    scores = jnp.einsum("bqx,bkx->bqk", q, k, precision="highest") * scale
    seen = jnp.tri(q.shape[1], dtype=bool)[None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bqk,bkv->bqv", weights, v, precision="highest")


def _first_head(gradients: tuple[Array, ...]) -> Array:
    return jnp.concatenate([g[:, :, 0].astype(jnp.float32) for g in gradients], axis=-1)


def decode(cases: dict[str, Decode]) -> list[Benchmark]:
    """Decoding over latents, full sequences; the rival is XLA's program of the definition, in BF16."""
    return [_decode(name, case) for name, case in cases.items()]


def _decode(name: str, case: Decode) -> Benchmark:
    scale = 192**-0.5  # of DeepSeek-V3's heads, whatever the width of what they are absorbed into

    def operands(key):
        q = (case.batch, case.queries, case.heads, case.width)
        return (
            *normal(key, q, (case.batch, case.tokens, case.width)),
            jnp.full(case.batch, case.tokens, jnp.int32),
        )

    def ours(q, cache, lengths):
        return mla_decode.decode(q, cache, lengths, scale, width=case.latent)[0]

    def dense(q, cache, lengths):
        ends = lengths[:, None] - jnp.arange(case.queries)[None, ::-1]
        seen = jnp.arange(case.tokens)[None, None] < ends[:, :, None]
        scores = jnp.einsum("bqhx,bsx->bqhs", q, cache, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf)).astype(cache.dtype)
        return jnp.einsum("bqhs,bsc->bqhc", weights, cache[..., : case.latent])

    def truth(q, cache, lengths):
        q, cache = q[:1].astype(jnp.float32), cache[:1].astype(jnp.float32)
        return reference.decode(q, cache, lengths[:1], scale, width=case.latent)[0]

    rows = case.batch * case.queries * case.heads
    return Benchmark(
        name=f"mla_decode, {name}",
        operands=operands,
        ours=Contender(same, ours),
        xla={"products and softmax": Contender(same, dense)},
        torch={},
        truth=truth,
        compared=lambda y: y[:1],
        flops=2.0 * rows * case.tokens * (case.width + case.latent),
        bytes=2.0 * (case.batch * case.tokens * case.width + rows * (case.width + case.latent)),
        fp8=0.0,
    )
