"""Pictures of how a loss fell, how evenly experts were used, and by which kinds of text."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv3_jax.training.metrics import write_atomically

_TRAIN, _VALIDATION, _REFERENCE, _SKIPPED = "#1f6fb4", "#d9480f", "#6b7280", "#b91c1c"
_MAP = "RdBu_r"
_INK, _FAINT = "#1f2937", "#e5e7eb"
_DOTS: dict[str, Any] = {"marker": "o", "markeredgecolor": "white", "markersize": 7, "linewidth": 1.5}
_POINTS = 2000  # more than the panel has pixels; longer runs are averaged in bins
_SMOOTHED_FROM = 60  # points from which a running mean says more than the points themselves


def draw(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    load: Num[np.ndarray, "L E"] | None,
    title: str,
    references: Mapping[str, float],
) -> None:
    """Draws the lines of `MetricsLog.read` and the latest expert load, without a display, atomically.

    Args:
        path: the PNG file.
        lines: with `main_loss` (else `loss`) or `val_loss`; steps where it is not finite are marked.
        load: tokens each expert was chosen by; None before the first step, or without routed layers.
        title: what was trained.
        references: losses to compare with, each drawn as a horizontal line with its name.
    """
    figure = Figure(figsize=(13, 5) if load is not None else (8, 5), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=_INK)
    if load is None:
        _losses(figure.add_subplot(), lines, references)
    else:
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _losses(left, lines, references)
        _heat_map(figure, right, np.asarray(load))
    _save(figure, path)


def draw_domains(path: Path, layers: Mapping[int, Mapping[str, Float[np.ndarray, " E"]]], title: str) -> None:
    """Draws the relative expert load of domains, a panel for each layer, all on one scale.

    Args:
        layers: of each layer, by domain, how often each expert was chosen over how often if all were alike.
    """
    names = list(next(iter(layers.values())))
    experts = len(next(iter(layers.values()))[names[0]])
    height = 0.55 + 0.3 * len(names)
    figure = Figure(
        figsize=(min(20.0, max(8.0, 3 + 0.42 * experts)), 1.0 + height * len(layers)),
        dpi=130,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=14, fontweight="bold", color=_INK)
    panels = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    stacked = {layer: np.stack([rows[name] for name in names]) for layer, rows in layers.items()}
    norm = _around_mean(np.concatenate(list(stacked.values())))
    for axes, (layer, relative) in zip(panels, stacked.items(), strict=True):
        axes.imshow(relative, cmap=_MAP, norm=norm, aspect="auto", interpolation="nearest")
        _decorate(axes, f"layer {layer}", "expert" if axes is panels[-1] else "", "")
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True))
        _borders(axes, relative)
    bar = figure.colorbar(ScalarMappable(norm, _MAP), ax=list(panels), pad=0.02, aspect=10 * len(layers))
    bar.set_label("load / balanced load", color=_INK)
    bar.ax.spines[:].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")  # a Figure made without pyplot draws itself with Agg
    write_atomically(Path(path), png.getvalue())


def _losses(axes: Axes, lines: Sequence[Mapping[str, Any]], references: Mapping[str, float]) -> None:
    steps, losses, skipped = _curve(lines, "main_loss", "loss")
    val_steps, val_losses, _ = _curve(lines, "val_loss")
    steps, losses = _binned(steps), _binned(losses)
    if losses.size >= _SMOOTHED_FROM:
        axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=_TRAIN, linewidth=2, label="training, smoothed")
    elif losses.size:
        axes.plot(steps, losses, "o-", color=_TRAIN, linewidth=1.5, markersize=3, label="training")
    if val_losses.size:
        axes.plot(
            val_steps, val_losses, color=_VALIDATION, label=f"validation, {val_losses[-1]:.3f}", **_DOTS
        )
    if skipped.size:
        low = axes.get_xaxis_transform()  # steps across, fractions of the panel upwards
        where = {"transform": low, "clip_on": False, "linestyle": "none", "marker": "|", "markersize": 12}
        axes.plot(skipped, np.zeros_like(skipped), color=_SKIPPED, label="not finite, skipped", **where)
    for name, value in references.items():
        axes.axhline(value, color=_REFERENCE, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{name} {value:.3f}", (1, value), (-6, 4), color=_REFERENCE, fontsize=9, **at)
    _decorate(axes, "Loss", "step", "cross-entropy, nats per token")
    axes.set_xlim(0, 1.02 * max([line["step"] for line in lines], default=1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(color=_FAINT, linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(facecolor="white", edgecolor=_FAINT, framealpha=0.9, fontsize=9)
    if not losses.size:
        axes.text(0.5, 0.25, "no finite loss yet", transform=axes.transAxes, ha="center", color=_REFERENCE)


def _heat_map(figure: Figure, axes: Axes, load: Num[np.ndarray, "L E"]) -> None:
    mean = load.mean(axis=1, keepdims=True, dtype=np.float64)
    relative = np.divide(load, mean, out=np.full(load.shape, np.nan), where=mean > 0)
    highest = np.nanmax(relative, initial=0.0)
    image = axes.imshow(
        relative, cmap=_MAP, norm=_around_mean(relative), aspect="auto", interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("tokens, relative to the layer's mean", color=_INK)
    bar.ax.spines[:].set_visible(False)
    busiest = f"the busiest does {highest:.2f} x the mean" if highest else "no tokens yet"
    _decorate(axes, f"Expert load, {busiest}", "expert", "routed layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    _borders(axes, load)


def _around_mean(relative: Float[np.ndarray, "rows E"]) -> TwoSlopeNorm:
    """White is the mean, so colour is imbalance; at least 0.5 on either side, so that noise stays pale."""
    lowest, highest = np.nanmin(relative, initial=1.0), np.nanmax(relative, initial=0.0)
    return TwoSlopeNorm(vcenter=1.0, vmin=min(0.5, lowest), vmax=max(1.5, highest))


def _borders(axes: Axes, load: Num[np.ndarray, "rows E"]) -> None:
    """Those of cells, as long as cells are larger than them."""
    if load.size <= 1024:
        axes.set_xticks(np.arange(-0.5, load.shape[1]), minor=True)
        axes.set_yticks(np.arange(-0.5, load.shape[0]), minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)


def _decorate(axes: Axes, title: str, across: str, upwards: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(upwards, color=_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.spines[:].set_color(_FAINT)
    axes.set_axisbelow(True)


def _curve(lines: Sequence[Mapping[str, Any]], *keys: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps and values, of the first key that a line has, where finite; and the steps where not."""
    found = ((line["step"], next((line[key] for key in keys if key in line), None)) for line in lines)
    points = [(step, float(value)) for step, value in found if value is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite], steps[~finite]


def _binned(values: np.ndarray) -> np.ndarray:
    if values.size <= _POINTS:
        return values
    starts = np.linspace(0, values.size, _POINTS, endpoint=False).astype(int)
    return np.add.reduceat(values, starts) / np.diff(starts, append=values.size)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of a window around each point that is narrower near the ends, so that it lags nowhere."""
    half = max(values.size // 50, 2)
    index = np.arange(values.size)
    reach = np.minimum(half, np.minimum(index, values.size - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
