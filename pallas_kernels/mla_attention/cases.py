"""Named shapes: of DeepSeek-V3's training, the same scaled down, and odd ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, by the letters of the shapes."""

    batch: int = 1  # [B]
    length: int  # [S]
    heads: int  # [H]
    width: int = (
        192  # [X] of queries and keys: 128 without position and 64 with (arXiv:2412.19437, section 4.2)
    )
    value_width: int = 128  # [V]
    documents: tuple[int, ...] = ()  # lengths of all but the last, which takes what is left of the row


FULL = {
    "pretraining": Case(length=4096, heads=128),
    "long context, a part of the heads": Case(
        length=32768, heads=16
    ),  # section 4.3 extends to 32K, then 128K
    "a length that no block divides": Case(length=4000, heads=16),
}

SMALL = {
    "one document": Case(length=256, heads=2),
    "documents across blocks": Case(batch=2, length=256, heads=1, documents=(100, 30, 61)),
    "documents of one token": Case(length=128, heads=1, documents=(1,) * 127),
    "a length that no block divides": Case(length=200, heads=1, documents=(70, 1)),
    "shorter than a block": Case(length=50, heads=2, documents=(20,)),
}
