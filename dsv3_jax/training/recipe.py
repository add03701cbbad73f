"""The pretraining recipe: what changes with the tokens seen (arXiv:2412.19437, section 4.2)."""

import math
from dataclasses import dataclass, fields

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""] | Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of the optimiser and its schedules; defaults are DeepSeek-V3's. Lengths are in tokens."""

    init_std: float = 0.006  # of every matrix at the start
    learning_rate: float = 2.2e-4
    warmup_steps: int = 2000
    constant_until: float = 10e12
    cosine_until: float = 14.3e12
    cosine_to: float = 2.2e-5
    second_constant_until: float = 14.633e12
    final_learning_rate: float = 7.3e-6
    batch_ramp_from: int = (
        3072  # sequences; up to config.train.batch_size, linearly in tokens (shape not published)
    )
    batch_ramp_tokens: float = 469e9  # 0: no ramp
    mtp_weight: float = 0.3  # lambda
    mtp_until: float = 10e12
    mtp_weight_after: float = 0.1
    bias_speed: float = 1e-3  # gamma
    bias_until: float = 14.3e12  # then 0
    balance_weight: float = 1e-4  # alpha
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8  # not published
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0: no average is kept; the report keeps one with a decay it does not give

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        wrong = []
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                wrong.append(f"config.recipe.{field.name}={value} must be finite and not negative.")
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                wrong.append(f"config.recipe.{name}={getattr(self, name)} must be below 1.")
        for name in ("init_std", "epsilon", "clip_norm"):
            if getattr(self, name) == 0:
                wrong.append(f"config.recipe.{name}=0 must be above zero.")
        if not self.constant_until <= self.cosine_until <= self.second_constant_until:
            wrong.append(
                f"config.recipe.constant_until={self.constant_until}, cosine_until={self.cosine_until} and "
                f"second_constant_until={self.second_constant_until} must not decrease."
            )
        if wrong:
            raise ValueError("\n".join(wrong))


def learning_rate(r: Recipe, step: Scalar, tokens: Scalar) -> Float[Array, ""]:
    """Linear from zero, constant, cosine, constant, and a lower constant to the end.

    Args:
        r: the recipe.
        step: steps done before this one; the first step runs at 1 / warmup_steps of the peak.
        tokens: tokens seen before this step.
    """
    span = max(r.cosine_until - r.constant_until, 1.0)
    done = jnp.clip((tokens - r.constant_until) / span, 0.0, 1.0)
    decayed = r.cosine_to + (r.learning_rate - r.cosine_to) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    rate = jnp.where(tokens < r.second_constant_until, decayed, r.final_learning_rate)
    return jnp.minimum((step + 1) / max(r.warmup_steps, 1), 1.0) * rate


def mtp_weight(r: Recipe, tokens: Scalar) -> Float[Array, ""]:
    """Lambda: what the losses of further tokens count for."""
    return jnp.where(tokens < r.mtp_until, r.mtp_weight, r.mtp_weight_after).astype(jnp.float32)


def bias_speed(r: Recipe, tokens: Scalar) -> Float[Array, ""]:
    """Gamma: how far an expert's bias moves in a step."""
    return jnp.where(tokens < r.bias_until, r.bias_speed, 0.0).astype(jnp.float32)


def batch_size(r: Recipe, full: int, multiple: int, tokens: int) -> int:
    """Sequences of the next step, rounded down to what the mesh and the micro-batches divide.

    Args:
        r: the recipe.
        full: sequences after the ramp.
        multiple: sequences that a batch must be a multiple of.
        tokens: tokens seen so far.
    """
    if tokens >= r.batch_ramp_tokens:
        return full
    start = min(r.batch_ramp_from, full)
    size = start + (full - start) * tokens / r.batch_ramp_tokens
    return max(int(size) // multiple * multiple, multiple)
