"""Text that is given piece by piece: whole characters only, and nothing that may begin a stop string."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from dsv3_jax.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what stands for bytes that are no character, or not yet one


@dataclass
class Stream:
    """Turns tokens into text as they come.

    Attributes:
        stops: strings before which the text ends.
        silent: tokens that are no text, such as those that end it.
        text: all that was given so far.
        stopped: whether a stop string was met; what comes after it is dropped.
    """

    tokenizer: Tokenizer
    stops: Sequence[str] = ()
    silent: Container[int] = ()
    text: str = ""
    stopped: bool = False
    _tokens: list[int] = field(default_factory=list)
    _before: int = 0  # the first of some tokens before those, as a text may begin otherwise than it goes on
    _start: int = 0  # of the tokens whose text is not settled
    _held: str = ""  # text that is settled, and may begin a stop string

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add as far as it is certain."""
        self._tokens += [token for token in tokens if token not in self.silent]
        pending = self._pending()
        # What ends in an incomplete character waits, but not for ever: no character has more than 4 bytes.
        if pending.endswith(_BROKEN) and len(self._tokens) - self._start < 64:
            return ""
        return self._give(self._settle(pending))

    def finish(self) -> str:
        """The rest, at the end of a text."""
        rest = self._held + self._settle(self._pending())
        self._held = ""
        return "" if self.stopped else self._cut(rest)

    def _pending(self) -> str:
        settled = self.tokenizer.decode(self._tokens[self._before : self._start])
        return self.tokenizer.decode(self._tokens[self._before :])[len(settled) :]

    def _settle(self, pending: str) -> str:
        self._before, self._start = self._start, len(self._tokens)
        return pending

    def _give(self, new: str) -> str:
        if self.stopped:
            return ""
        ready = self._held + new
        begins = max((_overlap(ready, stop) for stop in self.stops), default=0)
        self._held = ""
        cut = self._cut(ready[: len(ready) - begins], ready)
        if not self.stopped:
            self._held = ready[len(ready) - begins :]
        return cut

    def _cut(self, ready: str, seen: str | None = None) -> str:
        """What may be given, which ends before the first stop string that is seen."""
        seen = ready if seen is None else seen
        places = [place for stop in self.stops if (place := seen.find(stop)) >= 0]
        if places:
            self.stopped = True
            ready = seen[: min(places)]
        self.text += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text begin a string, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
