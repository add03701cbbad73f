"""A folder that is made in units, survives a kill, and appears under its name only when it is whole."""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class Stage:
    """The folder that will become the destination, and the journal of its finished units beside it.

    The journal has a line of JSON for what is made, then one for each finished unit.
    """

    def __init__(self, path: Path, journal: IO[bytes], done: dict[str, Any]):
        """Goes on after the units that are done."""
        self.path = path
        self.done = done  # what each finished unit recorded
        self._journal = journal
        self._lock = threading.Lock()

    def run(self, units: Iterable[str], make: Callable[[str], Any], workers: int) -> None:
        """Makes the units that are not done, several at once, and records each as soon as it is on disk.

        Args:
            make: makes a unit durable and returns what to record of it, as JSON.
        """

        def one(unit: str) -> None:
            self._record(unit, make(unit))

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, unit) for unit in units if unit not in self.done]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def keep(self, intact: Callable[[str, Any], Any]) -> None:
        """Forgets the units that are no longer what they recorded; they will be made again."""
        self.done = {unit: record for unit, record in self.done.items() if intact(unit, record)}

    def _record(self, unit: str, record: Any) -> None:
        with self._lock:
            _append(self._journal, {"unit": unit, "record": record})
            self.done[unit] = record


@contextmanager
def staged(directory: Path | str, plan: Mapping[str, Any]) -> Iterator[Stage]:
    """A stage that becomes `directory` when the block ends.

    If the process dies, or the block raises OSError or is interrupted, the stage stays and the next call
    with the same plan goes on in it. Any other exception says that the work cannot succeed: all vanishes.

    Args:
        plan: what decides every byte of the result, as JSON: the source and the options.

    Raises:
        FileExistsError: if the directory is not empty, or a stage of another plan or process is there.
    """
    target = Path(directory).absolute()
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: choose another destination or remove it.")
    made = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.partial")
    journal_path = target.with_name(f".{target.name}.partial.journal")
    with journal_path.open("ab+") as journal:
        _lock(journal, target)
        done = _begun(journal, journal_path, path, json.loads(json.dumps(plan)))
        path.mkdir(exist_ok=True)
        try:
            yield Stage(path, journal, done)
        except OSError:
            raise
        except Exception:
            shutil.rmtree(path)
            journal_path.unlink()
            for parent in made:
                parent.rmdir()
            raise
        os.rename(path, target)
        journal_path.unlink()


def _lock(journal: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or its process dies
    except BlockingIOError:
        raise FileExistsError(f"Another process is making {target}: wait for it, or end it.") from None


def _begun(journal: IO[bytes], journal_path: Path, stage: Path, plan: Any) -> dict[str, Any]:
    """What is done of a plan; a last line that a kill cut short is removed."""
    journal.seek(0)
    whole, lines = 0, []
    for line in journal:
        if not line.endswith(b"\n"):
            break
        lines.append(json.loads(line))
        whole += len(line)
    journal.truncate(whole)
    if not lines:  # the plan is recorded before anything is staged
        if stage.exists():
            raise FileExistsError(f"{stage} is there, but {journal_path} does not say of what: remove it.")
        _append(journal, plan)
        return {}
    if lines[0] != plan:
        differ = [k for k in sorted(plan.keys() | lines[0].keys()) if plan.get(k) != lines[0].get(k)]
        raise FileExistsError(
            f"{stage} was begun with another {' and another '.join(differ)}: repeat the command that began "
            f"it to go on, or remove it and {journal_path.name} to start anew."
        )
    if not stage.exists():
        journal.truncate(0)
        _append(journal, plan)
        return {}
    return {line["unit"]: line["record"] for line in lines[1:]}


def _append(journal: IO[bytes], value: Any) -> None:
    journal.write(json.dumps(value).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())
