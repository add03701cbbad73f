"""What a run shows while it goes: a live bar on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self, TextIO

from rich import progress as rich_progress
from rich.console import Console


class Progress(Protocol):
    """Shows how far a run is; used as a context manager."""

    def __enter__(self) -> Self:
        """Starts the clock."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal as it was."""
        ...

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows a finished step; of the values, `loss` and `tokens_per_second` where present."""
        ...

    def say(self, text: str) -> None:
        """Prints a line of its own, above a live bar."""
        ...


def progress(total: int, done: int, stream: TextIO | None = None) -> Progress:
    """The display that suits a stream.

    Args:
        total: steps of the whole run.
        done: steps that an earlier run has done already.
        stream: standard output unless given.
    """
    out = stream or sys.stdout
    return LiveProgress(total, done, Console(file=out)) if out.isatty() else Lines(total, out)


class LiveProgress:
    """A bar on a terminal; anything printed meanwhile appears above it."""

    def __init__(self, total: int, done: int, console: Console):
        """Prepares the bar; it is drawn on entry."""
        self._pace = _Pace(total)
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("[bold]step {task.completed:,.0f}/{task.total:,.0f}"),
            rich_progress.BarColumn(bar_width=None),
            rich_progress.TextColumn("[cyan]{task.fields[loss]}"),
            rich_progress.TextColumn("[green]{task.fields[speed]}"),
            rich_progress.TextColumn("[magenta]{task.fields[left]}"),
            rich_progress.TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done, loss="compiling", speed="", left="")

    def __enter__(self) -> Self:
        """Draws the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar's last state on the terminal."""
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Moves the bar."""
        left = self._pace.left(step)
        self._bar.update(self._task, completed=step, loss=_loss(values), speed=_speed(values), left=left)

    def say(self, text: str) -> None:
        """Prints above the bar, without reading the text as markup."""
        self._bar.console.print(text, markup=False, highlight=False)


class Lines:
    """One line an update, flushed, for files and pipes."""

    def __init__(self, total: int, stream: TextIO):
        """Takes any text file."""
        self._pace = _Pace(total)
        self._total = total
        self._stream = stream

    def __enter__(self) -> Self:
        """Has nothing to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Has nothing to close."""

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Prints the step, and what is known of loss, speed and time left."""
        parts = [f"step {step}/{self._total}", _loss(values), _speed(values), self._pace.left(step)]
        self.say("  ".join(part for part in parts if part))

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)


class _Pace:
    """Estimates the time left from the second update on: before the first, time went into compilation."""

    def __init__(self, total: int):
        self._total = total
        self._first: tuple[int, float] | None = None  # step and time of the first update

    def left(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first, start = self._first
        if step <= first:
            return ""
        return duration((now - start) / (step - first) * max(self._total - step, 0)) + " left"


def duration(seconds: float) -> str:
    """Time in words short enough for a line: 42s, 3m 05s, 2h 07m, 5d 03h."""
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // lower_size:02}{lower}"
    return f"{whole}s"


def _loss(values: Mapping[str, Any]) -> str:
    return f"loss {float(values['loss']):.4f}" if "loss" in values else ""


def _speed(values: Mapping[str, Any]) -> str:
    if "tokens_per_second" not in values:
        return ""
    speed = float(values["tokens_per_second"])
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if speed >= size:
            return f"{speed / size:.1f}{unit} tok/s"
    return f"{speed:.0f} tok/s"
