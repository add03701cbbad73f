"""What DeepSeek-V3's layers quantise of 4096 tokens (arXiv:2412.19437, section 4.2), and experts of 32768."""

TOKENS, ROUTED = 4096, 32768

# Rows and columns: the inputs and output gradients of products, which are quantised by row and along tokens.
MATRICES = [
    (TOKENS, 7168),  # a residual stream
    (TOKENS, 2112),  # latents of queries and keys together
    (TOKENS, 1536),
    (TOKENS, 576),
    (TOKENS, 16384),  # the heads of attention
    (TOKENS, 24576),
    (TOKENS, 36864),  # gate and up of a dense layer
    (ROUTED, 7168),
]
# Whole tiles, half a tile at the end, rows so long that few fit: TPU programs differ in little else.
DISTINCT = [MATRICES[0], MATRICES[1], MATRICES[6]]
# Rows and columns of the activation, whether rows have weights.
ACTIVATIONS = [
    (TOKENS, 2048, False),  # of the shared expert
    (TOKENS, 18432, False),  # of a dense layer
    (ROUTED, 2048, True),  # of routed experts
]
