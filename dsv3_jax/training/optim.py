"""AdamW with BF16 moments over FP32 master weights (arXiv:2412.19437, sections 3.3.2 and 4.2)."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsv3_jax.model.model import Model
from dsv3_jax.training.recipe import Recipe


class Moments(NamedTuple):
    """First and second moments, in a type of choice, and the number of updates made."""

    mu: Any
    nu: Any
    updates: Int[Array, ""]


def init(model: Model, r: Recipe, moments: jnp.dtype) -> optax.OptState:
    """The optimiser's state for these weights."""
    return adamw(r, moments).init(cast(optax.Params, model))


def update(
    grads: Model, norm: Float[Array, ""], state: optax.OptState, model: Model, r: Recipe, moments: jnp.dtype
) -> tuple[Model, optax.OptState]:
    """Clips gradients of this global norm, and returns what to subtract, once multiplied by the rate."""
    factor = jnp.minimum(1.0, r.clip_norm / jnp.maximum(norm, 1e-20))
    clipped = jax.tree.map(lambda g: g * factor, grads)
    direction, state = adamw(r, moments).update(
        cast(optax.Updates, clipped), state, cast(optax.Params, model)
    )
    return cast(Model, direction), state


def adamw(r: Recipe, moments: jnp.dtype) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on matrices, before the learning rate.

    Norm gains do not decay: zero is not where they should go. The report does not say.
    """
    return optax.chain(
        scale_by_adam(r.beta1, r.beta2, r.epsilon, moments),
        optax.add_decayed_weights(r.weight_decay, mask=_is_matrix),
    )


def scale_by_adam(
    beta1: float, beta2: float, epsilon: float, moments: jnp.dtype
) -> optax.GradientTransformation:
    """Adam's direction. Both moments are stored in `moments` and computed in FP32.

    (optax's own narrows the first only.)
    """

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=moments), params)  # noqa: E731
        return Moments(zeros(), zeros(), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        count = state.updates + 1
        average = lambda old, new, beta: beta * old.astype(jnp.float32) + (1 - beta) * new  # noqa: E731
        mu = jax.tree.map(lambda m, g: average(m, g, beta1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: average(v, jnp.square(g), beta2), state.nu, updates)
        unbias1, unbias2 = 1 - beta1**count, 1 - beta2**count
        direction = jax.tree.map(lambda m, v: m / unbias1 / (jnp.sqrt(v / unbias2) + epsilon), mu, nu)
        stored = jax.tree.map(lambda x: x.astype(moments), (mu, nu))
        return direction, Moments(stored[0], stored[1], count)

    return optax.GradientTransformation(init, update)


def _is_matrix(params):
    """Every leaf but norm gains, told by name: stacked gains have two axes as well."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path[-1:]), params
    )
