"""Tiles by shape, beside the numbers that chose them. Nothing here was timed on a device."""

LANES = 128  # of a TPU's vectors: columns of a group, and what rows of a block are a multiple of

# Rows of BF16 to E4M3: bundles in the compiled schedule for each vector of 1024 values (jax 0.12.0, libtpu
# 0.0.50), by the rows that are worked on at once.
#
#                                        tpu7x    v6e    v5p
#   32 rows                               2.68   7.18   7.86
#   64 rows                                  -      -   7.54
#   128 rows                              2.18      -      -
#   scales of all groups first, 32 rows   5.19   8.32   6.92
#   the cast alone, 32 rows               0.68   5.31   3.17
#
# 1024 tokens x 128 columns to E4M3 along tokens, likewise. Bytes are exchanged after the cast, which saves
# more on tpu7x than it costs on v5p:
#
#                                        tpu7x    v5p
#   BF16, FP32 exchanged                  3.31   5.65
#   BF16, E4M3 exchanged                  2.45   6.10
#   FP8 rows, FP32 exchanged              3.98   7.75
#   FP8 rows, E4M3 exchanged              3.54   8.50
#   SwiGLU of FP8 rows, FP32 exchanged    7.42  14.61
#   SwiGLU of FP8 rows, E4M3 exchanged    7.12  15.38
TPU_VMEM = 60 * 2**20  # bytes that the compiler may use, of 64 MiB on v5p and tpu7x
_BLOCK = 4 * 2**20  # bytes of a block that is read, so that two of them and their results fit
_VECTORS = 600  # that a loop's body works on, so that programs compile in seconds
TPU_ROWS = 1024  # of a block that is transposed
# Of the backward pass, worked on at once: 16, 32 and 64 take 11.5, 11.9 and 11.9 bundles for a vector of
# gradients of gate, and one of up, on tpu7x.
TPU_BACKWARD_ROWS = 32


def tpu_rows(m: int, bytes_of_row: int) -> int:
    """Of a block of whole rows: full lanes, for what there is one of for each row."""
    return min(m, max(_BLOCK // bytes_of_row // LANES, 1) * LANES)


def tpu_fits(columns: int) -> bool:
    """Whether the fewest rows of so many columns that are read, in FP32 and twice, leave room for results."""
    return LANES * columns * 4 * 2 <= TPU_VMEM * 3 // 4


def tpu_chunk(groups: int) -> int:
    """Rows of so many groups that a kernel works on at once, a multiple of FP8's packing."""
    return max(32, min(128, _VECTORS * 8 // groups // 32 * 32))


def tpu_transposed(m: int, k: int) -> tuple[int, int]:
    """Rows and columns of a block; where columns are a multiple of 128, a divisor of them."""
    columns = next(c for c in (1024, 512, 256, 128) if k % c == 0 or c == 128 or k % 128)
    return min(m, TPU_ROWS), min(k, columns)
