"""How far a conversion is: a bar in a terminal, elsewhere a line now and then."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

_SECONDS = 10.0  # between lines where there is no terminal


@contextmanager
def shown(sizes: Mapping[str, int], done: Collection[str]) -> Iterator[Callable[[int], None]]:
    """Gives a function to tell of bytes, from any thread; a bar, or a line now and then, shows them.

    Args:
        sizes: bytes of each unit.
        done: units that an earlier process finished; they count neither as progress nor as speed.
    """
    if done:
        print(f"Going on after {len(done)} of {len(sizes)} files, found intact.", flush=True)
    total = sum(n for unit, n in sizes.items() if unit not in done)
    console = Console()
    if not console.is_terminal:
        lines = _Lines(total)
        yield lines.advance
        lines.end()
        return
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, total: int):
        self._total, self._done, self._lock = total, 0, threading.Lock()
        self._start = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown > _SECONDS:
                self._shown = now
                speed = int(self._done / (now - self._start))
                print(f"{decimal(self._done)} of {decimal(self._total)}, {decimal(speed)}/s", flush=True)

    def end(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        print(
            f"{decimal(self._done)} in {seconds:.1f} seconds, {decimal(int(self._done / seconds))}/s",
            flush=True,
        )
