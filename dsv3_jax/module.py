"""The one base class of the model: an immutable Flax pytree."""

import dataclasses
from collections.abc import Callable

from flax import struct

# Marks fields that hold the matrix of a replaceable product, which a precision may prepare beforehand.
LINEAR = {"linear": True}


class Module(struct.PyTreeNode):
    """Parameters are fields, `init` makes them, `__call__` uses them; nothing is ever assigned.

    Field annotations give the shape of one layer's weight. They are not checked at run time, because
    the same class also carries stacked weights, gradients, shardings and abstract shapes.
    """

    # Keeps jaxtyping's import hook off the generated constructor, which JAX calls to rebuild trees.
    __no_type_check__ = True


def map_linear(f: Callable, module, *others):
    """The tree with `f` applied to its linear fields, and to those of trees that are built alike."""
    if not isinstance(module, Module):
        return module
    changed = {}
    for field in dataclasses.fields(module):
        values = [getattr(tree, field.name) for tree in (module, *others)]
        changed[field.name] = f(*values) if field.metadata.get("linear") else map_linear(f, *values)
    return module.replace(**changed)
