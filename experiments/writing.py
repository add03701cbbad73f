"""Texts that an engine writes, all together."""

from collections.abc import Sequence
from typing import Any, TextIO

from dsv3_jax.inference.engine import Engine, generated
from dsv3_jax.inference.request import News, Request
from dsv3_jax.inference.text import Stream


def write(
    engine: Engine, requests: Sequence[Request], streams: Sequence[Stream], told: TextIO | None = None
) -> list[dict[str, Any]]:
    """Runs all requests to their ends.

    Args:
        streams: one for each request, which takes its text.
        told: is given the text as it comes.

    Returns:
        Of each request its "text", "tokens", "logprobs" and "finish_reason".
    """

    def listen(n: int, news: News) -> bool:
        piece = streams[n].push(news.tokens)
        if news.finished and not streams[n].stopped:
            piece += streams[n].finish()
        if told:
            told.write(piece)
            told.flush()
        return not streams[n].stopped

    results = []
    for n, (tokens, logprobs) in enumerate(generated(engine, list(requests), listen)):
        ended = streams[n].stopped or tokens[-1] in requests[n].ends
        reason = "stop" if ended else "length"
        results.append(
            {"text": streams[n].text, "tokens": tokens, "logprobs": logprobs, "finish_reason": reason}
        )
    return results
