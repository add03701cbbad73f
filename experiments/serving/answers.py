"""What a request is answered with: texts as they grow, and their forms in OpenAI's API."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from dsv3_jax.inference.request import News
from dsv3_jax.inference.text import Stream
from experiments.serving.schema import Options, error, usage

Show = Callable[[int, "Choice", str], dict[str, Any]]  # of a choice's number, itself and text of it


@dataclass
class Choice:
    """One text under way."""

    stream: Stream
    ends: tuple[int, ...]
    cancel: Callable[[], None] = lambda: None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    shown: int = 0  # tokens whose log-probabilities were sent
    reason: str | None = None

    def take(self, news: News) -> str:
        """The text that news adds."""
        self.tokens += news.tokens
        self.logprobs += news.logprobs
        piece = self.stream.push([t for t in news.tokens if t not in self.ends])
        if self.stream.stopped:
            self.cancel()
            self.reason = "stop"
        elif news.finished:
            piece += self.stream.finish()
            ended = self.stream.stopped or self.tokens[-1] in self.ends
            self.reason = "stop" if ended else "length"
        return piece


def completion(n: int, choice: Choice, text: str) -> dict[str, Any]:
    """A choice of a completion."""
    return {"index": n, "text": text, "logprobs": None, "finish_reason": choice.reason}


def completion_with_logprobs(n: int, choice: Choice, text: str) -> dict[str, Any]:
    """The same with the tokens that were given since the last, and their log-probabilities."""
    tokens = choice.tokens[choice.shown :]
    logprobs = choice.logprobs[choice.shown :]
    choice.shown = len(choice.tokens)
    words = [choice.stream.tokenizer.decode([token]) for token in tokens]
    shown = {"tokens": words, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}
    return completion(n, choice, text) | {"logprobs": shown}


def chat(n: int, choice: Choice, text: str) -> dict[str, Any]:
    """A choice of a chat completion."""
    message = {"role": "assistant", "content": text}
    return {"index": n, "message": message, "logprobs": None, "finish_reason": choice.reason}


def _part(shown: dict[str, Any]) -> dict[str, Any]:
    """A choice as a part of a stream."""
    message = shown.pop("message", None)
    return shown if message is None else shown | {"delta": message}


async def events(
    head: dict[str, Any],
    asked: Options,
    choices: list[Choice],
    first: tuple[int, str],
    spoken: AsyncIterator[tuple[int, str]],
    show: Show,
    prompt_tokens: int,
) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events."""
    if head["object"] == "chat.completion":
        head = head | {"object": "chat.completion.chunk"}

    def line(n: int, piece: str) -> str:
        return _line(head | {"choices": [_part(show(n, choices[n], piece))]})

    yield line(*first)
    try:
        async for n, piece in spoken:
            if piece or choices[n].reason is not None:
                yield line(n, piece)
    except Exception as wrong:  # the status is sent already
        yield _line(error(str(wrong), "server_error"))
        return
    if asked.wants_usage:
        given = sum(len(choice.tokens) for choice in choices)
        yield _line(head | {"choices": [], "usage": usage(prompt_tokens, given)})
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
