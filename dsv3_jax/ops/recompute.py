"""Which activations of a layer are kept for the backward pass, and which are computed again."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

Tree = TypeVar("Tree")
Remat = Callable[[Callable], Callable]

# The outputs of products and of communication; norms, up-projections of MLA, attention probabilities and
# SwiGLU are recomputed from them (arXiv:2412.19437, section 3.2.3).
SAVED = ("latent", "attention", "residual", "routed_rows", "hidden", "combined")


def keep(x: Tree, name: str) -> Tree:
    """Marks an activation, or all arrays of one, as what `norms_and_up_projections` keeps."""
    assert name in SAVED, name
    return jax.tree.map(lambda a: checkpoint_name(a, name), x)


def nothing(layer: Callable) -> Callable:
    """Recomputes nothing: the fastest where memory is plenty."""
    return layer


def norms_and_up_projections(layer: Callable) -> Callable:
    """Recomputes RMSNorms and MLA up-projections, as the report does, and keeps the marked activations."""
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def experts(layer: Callable) -> Callable:
    """Recomputes routed experts too, and sends their tokens again: of them only their sum is kept.

    For memory that does not hold the rows of all experts, of which there is as much as there is room for.
    """
    names = (name for name in SAVED if name not in ("routed_rows", "hidden"))
    return jax.checkpoint(
        layer, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False
    )


def everything(layer: Callable) -> Callable:
    """Keeps only the input of each layer."""
    return jax.checkpoint(layer, prevent_cse=False)
