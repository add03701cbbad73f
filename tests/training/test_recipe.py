"""The schedules are the report's (arXiv:2412.19437, section 4.2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.training import recipe
from dsv3_jax.training.recipe import Recipe

R = Recipe()
LATE = 10**6  # a step after the warm-up


@pytest.mark.parametrize(
    "step,tokens,want",
    [
        (0, 0, 2.2e-4 / 2000),
        (999, 0, 1.1e-4),
        (1999, 0, 2.2e-4),
        (LATE, 9.99e12, 2.2e-4),
        (LATE, 12.15e12, (2.2e-4 + 2.2e-5) / 2),  # halfway down the cosine
        (LATE, 14.3e12, 2.2e-5),
        (LATE, 14.6e12, 2.2e-5),
        (LATE, 14.64e12, 7.3e-6),
        (LATE, 14.8e12, 7.3e-6),
    ],
)
def test_the_learning_rate_at_every_turn(step, tokens, want):
    assert float(recipe.learning_rate(R, step, tokens)) == pytest.approx(want, rel=1e-4)


def test_weights_of_the_other_losses_and_the_bias_speed():
    assert [float(recipe.mtp_weight(R, t)) for t in (0, 9.9e12, 10.1e12)] == pytest.approx([0.3, 0.3, 0.1])
    assert [float(recipe.bias_speed(R, t)) for t in (0, 14.2e12, 14.4e12)] == pytest.approx([1e-3, 1e-3, 0])


@given(st.integers(0, 600_000_000_000), st.integers(0, 10_000_000_000))
def test_the_batch_ramps_up_in_multiples(tokens, more):
    size = recipe.batch_size(R, 15_360, 256, tokens)
    assert size % 256 == 0 and 3072 <= size <= 15_360
    assert recipe.batch_size(R, 15_360, 256, tokens + more) >= size
    assert recipe.batch_size(R, 15_360, 256, int(469e9)) == 15_360
    assert recipe.batch_size(R, 15_360, 256, 0) == 3072


@pytest.mark.parametrize(
    "key,value", [("learning_rate", float("nan")), ("beta2", 1.0), ("clip_norm", 0.0), ("cosine_until", 1.0)]
)
def test_numbers_that_make_no_recipe_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=key):
        Recipe(**{key: value})
