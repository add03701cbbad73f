"""Fill-in-the-middle on documents, before packing, in PSM form (arXiv:2412.19437, section 4.1)."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer

Encoder = Callable[[str, Tokenizer, np.random.Generator], Int32[np.ndarray, " tokens"]]


def encoder(rate: float) -> Encoder:
    """The encoding of documents of which a share `rate` have their middle moved to the end."""
    if rate == 0:
        return whole

    def encode(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> Int32[np.ndarray, " tokens"]:
        return (fill_in_middle if rng.random() < rate else whole)(text, tokenizer, rng)

    return encode


def whole(
    text: str, tokenizer: Tokenizer, rng: np.random.Generator | None = None
) -> Int32[np.ndarray, " tokens"]:
    """A document as it is: its tokens and the end-of-document token."""
    return np.append(tokenizer.encode(text), np.int32(tokenizer.eos))


def fill_in_middle(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> Int32[np.ndarray, " tokens"]:
    """Begin, prefix, hole, suffix, end, middle, end of document.

    Both cuts are uniform over the places between characters, not tokens: a model that completes code must
    go on from the middle of a word.
    """
    marks = tokenizer.fill
    assert marks is not None, "check_rate was not called"
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    prefix, middle, suffix = (tokenizer.encode(t) for t in (text[:first], text[first:second], text[second:]))
    parts = [[marks.begin], prefix, [marks.hole], suffix, [marks.end], middle, [tokenizer.eos]]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def check_rate(rate: float, tokenizer: Tokenizer) -> None:
    """Refuses a rate that is no probability, or that needs tokens the tokenizer lacks."""
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(
            f"config.data.fill_in_middle_rate={rate} must be between 0 and 1; the report uses 0.1."
        )
    if rate and tokenizer.fill is None:
        raise ValueError(
            f"config.data.fill_in_middle_rate={rate} needs fill-in-the-middle tokens, which {tokenizer.path} "
            "lacks; set the rate to 0, or choose a tokenizer that has them."
        )
