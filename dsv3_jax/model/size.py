"""How many parameters a model has and what a token costs, by shape evaluation, without memory."""

import math
from typing import NamedTuple

import jax

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.model import Model


def abstract(c: Config) -> Model:
    """The model's shapes and types."""
    key = jax.eval_shape(jax.random.key, 0)
    with mesh.for_shapes():
        return jax.eval_shape(lambda k: Model.init(k, c, std=1.0), key)


def parameters(c: Config) -> int:
    """Parameters of the main model, the expert bias among them, without multi-token prediction."""
    return _count(abstract(c).replace(mtp=None)) + c.routed_layers * c.experts


def mtp_parameters(c: Config) -> int:
    """What multi-token prediction adds; embedding and head are the main model's."""
    return _count(abstract(c).mtp) + c.mtp_depth * c.experts


def active_parameters(c: Config) -> int:
    """Parameters of the main model that one token meets: all but the experts it does not choose."""
    return parameters(c) - c.routed_layers * (c.experts - c.top_k) * 3 * c.d_model * c.d_expert


def flops_per_token(c: Config, sequence_length: int) -> float:
    """Floating-point operations of forward and backward, as DeepSeek counts them for utilisation.

    Six for each weight that a token is multiplied by (no embedding table, no norms), and attention over the
    half of the positions that is visible on average. Recomputation and multi-token prediction do not count
    (arXiv:2505.09343, table 4).
    """
    norms = c.layers * (2 * c.d_model + c.kv_rank + (c.q_rank or 0)) + c.d_model
    multiplied = active_parameters(c) - c.vocab * c.d_model - norms - c.routed_layers * c.experts
    attention = c.layers * c.heads * (c.d_nope + c.d_rope + c.d_value) * sequence_length / 2
    return 6.0 * (multiplied + attention)


class Cost(NamedTuple):
    """Multiplications of a forward pass a token."""

    dense: float  # one dense layer
    routed: float  # one routed layer
    head: float
    mtp: float  # all depths, without their heads


def forward_cost(c: Config) -> Cost:
    """What the parts of a model cost beside each other, at its longest sequences."""
    m = abstract(c)
    attention = c.heads * (c.d_nope + c.d_rope + c.d_value) * c.max_length / 2
    unused = (c.experts - c.top_k) * 3 * c.d_model * c.d_expert

    def each(stack, layers: int, unused: float) -> float:
        return _count(stack) / layers - unused + attention if layers else 0.0

    return Cost(
        each(m.dense, c.dense_layers, 0.0),
        each(m.routed, c.routed_layers, unused),
        float(c.d_model * c.vocab),
        c.mtp_depth * each(m.mtp, c.mtp_depth, unused),
    )


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
