"""The figures of a plan as words for a terminal, and as one page without scripts or other files."""

import html as markup
from collections.abc import Sequence
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .75rem .25rem 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { display: flex; height: 1.5rem; background: #f3f4f6; border-radius: .25rem; overflow: hidden }
.bar span { height: 100% } .over { outline: 2px solid #b91c1c }
i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em }
"""
_COLOURS = ("#4f9d69", "#5aa9c9", "#8a7fc7", "#f4b860", "#d97757", "#9ca3af")
_HIDDEN, _EXPOSED = "#4f9d69", "#d97757"


def words(figures: dict[str, Any]) -> str:
    """A few lines: whether it fits, what hides what, and what a step takes."""
    device, memory = figures["device"], figures["memory"]
    lines = [
        f"{figures['config']} on {device['count']} devices of {device['kind']} ({figures['topology']})",
        f"memory: {_gb(memory['peak_bytes'])} of {_gb(device['memory_bytes'])} a device"
        + ("" if memory["fits"] else " (DOES NOT FIT)")
        + "; "
        + ", ".join(f"{kind.replace('_', ' ')} {_gb(size)}" for kind, size in memory["by_kind"].items()),
    ]
    lines += [
        f"{kind.replace('_', ' ')}: {c['seconds']:.3f} s, {100 * c['hidden_share']:.1f}% beside compute"
        + (f", {c['asynchronous']:.0f} of {c['count']:.0f} asynchronous" if "count" in c else "")
        for kind, c in figures["collectives"].items()
    ]
    lines += [
        f"{term.replace('_', ' ')}: {seconds:.3f} s" for term, seconds in figures.get("terms", {}).items()
    ]
    lines += [
        f"a step: {figures['step_seconds_bound']:.2f} s, {figures['tokens_per_second_bound']:,.0f} tokens/s, "
        f"{100 * figures['mfu_bound']:.1f}% of the BF16 peak (model FLOPs); 14.8T tokens: "
        f"{figures['device_hours_for_14.8T_tokens'] / 1e3:,.0f} thousand device-hours",
    ]
    lines += [
        f"  {row['schedule']:9s} {row['step_seconds']:7.2f} s a step, {_gb(row['memory_bytes'])} a device"
        + ("" if row["fits"] else " (does not fit)")
        for row in figures.get("schedules", [])
    ]
    lines += [f"  {name}: {reason}" for name, reason in figures.get("impossible", {}).items()]
    if "compile_seconds" in figures:
        lines.append(f"compiled in {figures['compile_seconds']:.0f} s; times are bounds, not measurements")
    return "\n".join(lines)


def html(figures: dict[str, Any]) -> str:
    """One self-contained page."""
    device, memory = figures["device"], figures["memory"]
    title = f"{figures['config']} on {figures['topology']}"
    parts = [
        f"<h1>{_text(title)}</h1><p>{device['count']} devices of {_text(device['kind'])}. "
        f"A step takes at least <b>{figures['step_seconds_bound']:.2f} s</b>: "
        f"{figures['tokens_per_second_bound']:,.0f} tokens/s, "
        f"{100 * figures['mfu_bound']:.1f}% of the BF16 peak.</p>",
        f"<h2>Memory of a device: {_gb(memory['peak_bytes'])} of {_gb(device['memory_bytes'])}"
        f"{'' if memory['fits'] else ', which does not fit'}</h2>",
        _strip(
            list(zip(memory["by_kind"].values(), _COLOURS, strict=False)),
            max(device["memory_bytes"], memory["peak_bytes"]),
            "" if memory["fits"] else " over",
        ),
        _table([(kind, _gb(size)) for kind, size in memory["by_kind"].items()], colours=_COLOURS),
        "<h2>Collectives: beside compute, and waited for</h2>",
    ]
    for kind, c in figures["collectives"].items():
        hidden = c["seconds"] * c["hidden_share"]
        parts += [
            f"<p>{_text(kind)}: {c['seconds']:.3f} s, {_gb(c['bytes'])} sent, "
            f"{100 * c['hidden_share']:.1f}% hidden</p>",
            _strip([(hidden, _HIDDEN), (c["seconds"] - hidden, _EXPOSED)], c["seconds"]),
        ]
    for name, column in (("terms", "seconds"), ("schedules", "step")):
        if name in figures:
            parts += [f"<h2>{name.capitalize()}</h2>", _rows(figures[name], column)]
    if figures.get("exposed"):
        parts.append("<h2>What is waited for longest</h2>")
        parts.append(_table([(line["op_name"], f"{line['seconds']:.3f} s") for line in figures["exposed"]]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>"
    )


def _rows(values: Any, column: str) -> str:
    if isinstance(values, dict):
        return _table([(term, f"{seconds:.3f} s") for term, seconds in values.items()])
    return _table(
        [
            (row["schedule"], f"{row['step_seconds']:.2f} s a {column}, {_gb(row['memory_bytes'])}")
            for row in values
        ]
    )


def _strip(shares: Sequence[tuple[float, str]], whole: float, mark: str = "") -> str:
    spans = "".join(
        f'<span style="width:{100 * max(size, 0) / whole:.2f}%;background:{colour}"></span>'
        for size, colour in shares
    )
    return f'<div class="bar{mark}">{spans}</div>'


def _table(rows: list[tuple[str, str]], colours: tuple[str, ...] = ()) -> str:
    marks = [f'<i style="background:{colour}"></i>' for colour in colours] + [""] * len(rows)
    cells = (
        f'<tr><td>{mark}{_text(name)}</td><td class="number">{_text(value)}</td></tr>'
        for mark, (name, value) in zip(marks, rows, strict=False)
    )
    return f"<table>{''.join(cells)}</table>"


def _text(words: str) -> str:
    return markup.escape(words.replace("_", " "))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
