"""Named shapes: of the experts that one device of DeepSeek-V3's training has, and small ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one product, by the letters of the shapes; the sums of its gradient are K by N."""

    rows: int  # [M]
    groups: int  # [G]
    depth: int  # [K]
    columns: int  # [N]


# 8 groups of 4096 rows, as DeepGEMM measures them, and 32 of 1024: gate with up, down, and the gradients of
# their inputs (arXiv:2412.19437, section 4.2: width 7168, experts of 2048).
FULL = {
    f"{groups} groups, {columns} x {depth}": Case(rows=32768, groups=groups, depth=depth, columns=columns)
    for groups in (8, 32)
    for columns, depth in ((4096, 7168), (7168, 2048), (7168, 4096), (2048, 7168))
}

# Sizes of groups that start at multiples of 128, in 4 x 128 rows.
SMALL = {
    "uneven": (130, 0, 70),
    "all in the last": (0, 0, 300),
    "all in the first, and none after": (257, 0, 0),
    "full blocks": (128, 256, 128),
    "empty": (0, 0, 0),
}
