"""What an engine is asked for, what it answers, and the sizes that it is built for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to go on.

    Attributes:
        most: tokens to give at most.
        ends: ids that end the text, at most as many as the engine has room for; the last token given is one
            of them unless `most` came first.
        temperature, top_k, top_p, seed: see `sampling.Sampling`.
    """

    prompt: Sequence[int]
    most: int
    ends: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes that programs are compiled for."""

    slots: int = 8  # sequences at once; a multiple of the devices
    length: int = 1024  # tokens of a sequence, prompt and all
    part: int = 256  # tokens of prompts that are read between steps at most; a power of two
    steps: int = 8  # that sequences go on before others are looked at
    ends: int = 4  # ids that end a text
    drafts: int = 1  # tokens that MTP adds to a step: 0 or 1

    def __post_init__(self):
        """Reports every violation at once."""
        wrong = [
            f"{name}={getattr(self, name)} must be above 0."
            for name in ("slots", "length", "part", "steps", "ends")
            if getattr(self, name) < 1
        ]
        if self.part & (self.part - 1):
            wrong.append(f"part={self.part} is no power of two: take {1 << self.part.bit_length()}.")
        if self.drafts not in (0, 1):
            wrong.append(f"drafts={self.drafts} must be 0 or 1, as one depth of MTP drafts.")
        if wrong:
            raise ValueError("\n".join(wrong))


class News(NamedTuple):
    """What a step of the engine gave a request."""

    number: int  # of the request
    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Counts(NamedTuple):
    """What an engine has done so far."""

    prompt_tokens: int = 0
    tokens: int = 0  # given
    steps: int = 0  # of sequences
    drafts: int = 0  # looked at
    accepted: int = 0  # of these

    @property
    def tokens_per_step(self) -> float:
        """Of a sequence that goes on."""
        return (self.steps + self.accepted) / max(1, self.steps)

    @property
    def acceptance(self) -> float:
        """The share of drafts that were right."""
        return self.accepted / max(1, self.drafts)


def check(request: Request, limits: Limits, vocab: int) -> None:
    """Refuses a request that can never be served.

    Raises:
        ValueError: saying why.
    """
    prompt = len(request.prompt)
    if not prompt or request.most < 1:
        raise ValueError(f"A prompt of {prompt} tokens and {request.most} to give: both must be above 0.")
    if prompt + request.most > limits.length:
        raise ValueError(
            f"A prompt of {prompt} tokens and {request.most} to give are more than the {limits.length} "
            "of a slot: shorten the prompt, ask for fewer, or raise the length."
        )
    wrong = [t for t in request.prompt if not 0 <= t < vocab]
    if wrong:
        raise ValueError(f"The prompt has the id {wrong[0]}, but ids are from 0 to {vocab - 1}.")
    if not (0 <= request.temperature < 1e30 and 0 <= request.top_p <= 1 and 0 <= request.top_k < 2**31):
        raise ValueError(
            f"temperature={request.temperature}, top_p={request.top_p} and top_k={request.top_k} must be "
            "0 or more, top_p at most 1, and all finite."
        )
    if len(request.ends) > limits.ends:
        raise ValueError(f"{len(request.ends)} ids end a text, but there is room for {limits.ends}.")
