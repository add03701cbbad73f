"""The one base class of the model: an immutable Flax pytree."""

from flax import struct


class Module(struct.PyTreeNode):
    """Parameters are fields, `init` makes them, `__call__` uses them; nothing is ever assigned.

    Field annotations give the shape of one layer's weight. They are not checked at run time, because
    the same class also carries stacked weights, gradients, shardings and abstract shapes.
    """

    # Keeps jaxtyping's import hook off the generated constructor, which JAX calls to rebuild trees.
    __no_type_check__ = True
