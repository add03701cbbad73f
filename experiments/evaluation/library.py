"""Text of the standard library by kind."""

import ast
from collections.abc import Iterator

from dsv3_jax.data import corpus
from dsv3_jax.data.config import Data


def held_out() -> list[str]:
    """The files that a run with the default configuration does not train on, in the order of their hashes."""
    data = Data()
    _, validation = corpus.split(corpus.standard_library(data.max_document_bytes), data.validation_fraction)
    return [validation[n] for n in range(len(validation))]


def is_code(text: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def docstrings(source: str) -> Iterator[str]:
    """Those of a module, its classes and functions."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (found := ast.get_docstring(node)):
            yield found
