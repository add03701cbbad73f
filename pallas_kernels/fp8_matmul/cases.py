"""The products of DeepSeek-V3's linear layers with 4096 tokens (arXiv:2412.19437, section 4.2)."""

from typing import NamedTuple

TOKENS = 4096


class Case(NamedTuple):
    """x [m, k] times w [n, k] transposed; `tile` rows of w share a scale, and with 1 there are sums."""

    m: int
    n: int
    k: int
    tile: int = 128


LAYERS = {  # name: columns that come out, columns that go in
    "q_down and kv_down": (2112, 7168),
    "q_down": (1536, 7168),
    "kv_down": (576, 7168),
    "q_up": (24576, 1536),
    "kv_up": (32768, 512),
    "attention out": (7168, 16384),
    "shared expert gate and up": (4096, 7168),
    "shared expert down": (7168, 2048),
    "dense gate and up": (36864, 7168),
    "dense down": (7168, 18432),
}
FORWARD = [Case(TOKENS, n, k) for n, k in LAYERS.values()]
DGRAD = [Case(TOKENS, k, n) for n, k in LAYERS.values()]
WGRAD = [Case(k, n, TOKENS, tile=1) for n, k in LAYERS.values()]
DECODE = [Case(128, n, k) for n, k in LAYERS.values()]
# Odd N, odd K with one step and with several, and sums: compiled TPU programs differ in little else than
# their loops.
DISTINCT = [
    Case(TOKENS, 2112, 7168),
    Case(TOKENS, 7168, 576),
    Case(TOKENS, 7168, 2112),
    Case(7168, 576, TOKENS, 1),
]
