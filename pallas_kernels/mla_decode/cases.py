"""Named shapes of decoding: those of DeepSeek-V3, those that FlashMLA is measured with, and small ones."""

from dataclasses import dataclass

LATENT, ROTATED = 512, 64  # numbers of a cached token (arXiv:2412.19437, section 4.2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, by the letters of the shapes."""

    batch: int  # [B]
    queries: int = 1  # [Q]
    heads: int  # [H] of 128, or of those that a device of a mesh has
    tokens: int  # [S]
    latent: int = LATENT  # [C]
    rotated: int = ROTATED
    page: int = 64

    @property
    def width(self) -> int:
        """[W] of a token."""
        return self.latent + self.rotated


FULL = {
    "one sequence": Case(batch=1, heads=128, tokens=32768),
    "a large batch": Case(batch=128, heads=128, tokens=4096),
    "a large batch, two new tokens": Case(batch=128, queries=2, heads=128, tokens=4096),
    "long sequences": Case(batch=32, heads=128, tokens=32768),
    "half the heads": Case(batch=64, heads=64, tokens=8192),
    "an eighth of the heads": Case(batch=128, heads=16, tokens=32768),
    "an eighth of the heads, two new tokens": Case(batch=4, queries=2, heads=16, tokens=16384),
}

SMALL = {
    "one new token": Case(batch=3, heads=4, tokens=256, latent=128, page=16),
    "four new tokens": Case(batch=3, queries=4, heads=2, tokens=200, latent=128, page=16),
    "the widths of DeepSeek-V3": Case(batch=2, queries=2, heads=8, tokens=130, page=64),
    "whole blocks": Case(batch=3, queries=2, heads=8, tokens=192, page=64),
    "more rows than a block": Case(batch=2, heads=70, tokens=256, page=128),
}
