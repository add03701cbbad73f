"""Requests of the OpenAI API (completions, chat completions) as far as they are served, and their answers."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Tokens = list[Annotated[int, Field(ge=0)]]


class Options(BaseModel):
    """What both kinds of requests share; keys that are not known are ignored, as clients send many."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str = ""
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, lt=2**31)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        """Strings before which the text ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class Completion(Options):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(max_length=64)] | Tokens | list[Tokens]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=0, description="0 for those of the tokens given")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class Chat(Options):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def envelope(kind: str, model: str) -> dict[str, Any]:
    """What every answer begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [],
    }


def usage(prompt: int, given: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": given, "total_tokens": prompt + given}


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that says what was wrong."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
