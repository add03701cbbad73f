"""Programs here are compiled once and run for a moment: XLA takes half the time for them as they are."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def as_they_are():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
