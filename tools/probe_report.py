"""What `tools.long_context` prints and draws of its measurements."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.training.metrics import write_atomically

_COLOURS = ("#b91c1c", "#d97706", "#64748b", "#1f6fb4")
_INK, _FAINT = "#1f2937", "#e5e7eb"


class Measured(NamedTuple):
    """One model."""

    name: str
    losses: list[float]  # nats per token, by bucket of position
    recall: Float[np.ndarray, "lengths depths"]


class Scale(NamedTuple):
    """What the measurements were made at."""

    edges: Sequence[int]  # of the buckets, in tokens
    lengths: Sequence[int]  # of contexts, in tokens
    depths: Sequence[float]  # share of the text before the needle


def table(found: Sequence[Measured], scale: Scale) -> list[str]:
    """Markdown: loss by position, then recall by length of the context, over all depths."""
    buckets = [f"{a}..{b - 1}" for a, b in zip(scale.edges, scale.edges[1:], strict=False)]
    losses = {m.name: [f"{loss:.3f}" for loss in m.losses] for m in found}
    recalls = {m.name: [f"{share:.0%}" for share in m.recall.mean(axis=1)] for m in found}
    return [
        *_markdown("loss at positions", buckets, losses),
        "",
        *_markdown("needles found within", list(map(str, scale.lengths)), recalls),
    ]


def _markdown(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [
        [corner, *columns],
        ["---"] * (len(columns) + 1),
        *([name, *cells] for name, cells in rows.items()),
    ]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def draw(path: Path, found: Sequence[Measured], scale: Scale) -> None:
    """Loss by position, a curve for each model, over recall by length and depth, a map for each."""
    figure = Figure(figsize=(12, 8.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, len(found), height_ratios=[1.15, 1])
    _curves(figure.add_subplot(grid[0, :]), found, scale)
    maps = [figure.add_subplot(grid[1, n]) for n in range(len(found))]
    images = [_map(axes, measured, scale) for axes, measured in zip(maps, found, strict=True)]
    maps[0].set_ylabel("text before the needle", color=_INK)
    for axes in maps[1:]:
        axes.set_yticklabels([])
    bar = figure.colorbar(images[0], ax=maps, pad=0.01, shrink=0.9)
    bar.set_label("needles found (%)", color=_INK)
    bar.ax.spines[:].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _curves(axes: Axes, found: Sequence[Measured], scale: Scale) -> None:
    across = np.arange(len(scale.edges) - 1)
    for colour, measured in zip(_COLOURS, found, strict=False):
        style = {"marker": "o", "markersize": 6, "linewidth": 2, "markeredgecolor": "white"}
        axes.plot(across, measured.losses, color=colour, label=measured.name, **style)
    axes.set_xticks(across, [f"{a}-{b - 1}" for a, b in zip(scale.edges, scale.edges[1:], strict=False)])
    axes.set_title("Loss by position", loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_xlabel("position in the sequence (tokens)", color=_INK)
    axes.set_ylabel("nats per token", color=_INK)
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)


def _map(axes: Axes, measured: Measured, scale: Scale):
    share = 100 * measured.recall.T
    image = axes.imshow(share, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if abs(value - 50) > 35 else _INK  # on the dark ends of the scale
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(scale.lengths)), [_short(length) for length in scale.lengths])
    axes.set_yticks(range(len(scale.depths)), [f"{depth:.0%}" for depth in scale.depths])
    title = f"{measured.name}: {share.mean():.0f}% found"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_xlabel("context (tokens)", color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    return image


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
