"""The HTTP side of serving: completions and chat completions as OpenAI has them, health, metrics, and a page.

Nothing a client sends reaches the engine unchecked, and a client that goes away gives its slots back.
"""

import asyncio
import contextlib
import hmac
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.request import News, Request
from dsv3_jax.inference.text import Stream
from dsv3_jax.interop.chat import ChatTemplate
from experiments.serving import answers, schema
from experiments.serving.answers import Choice
from experiments.serving.schema import Chat, Completion, Options
from experiments.serving.worker import Full, Stopped, Worker

PAGE = (Path(__file__).parent / "page.html").read_text("utf-8")
_BODY = 30.0  # seconds that a request may take to arrive
_POLL = 0.25  # seconds between looks at whether a client is still there


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 1_000_000
    seconds: float = 600.0  # that an answer may take
    length: int = 4096  # tokens of prompt and answer


class Wrong(Exception):
    """An answer that is not what was asked for: an HTTP status and the words for it."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        """As in OpenAI's errors."""
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass(frozen=True, kw_only=True)
class Service:
    """All that answering takes."""

    worker: Worker
    text: Tokenizer
    template: ChatTemplate | None
    bos: list[int]
    name: str
    limits: Limits
    key: str | None = None

    def app(self) -> Starlette:
        """The application, whose worker ends with it."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.worker.stop)

        registry = CollectorRegistry()
        registry.register(_Gauges(self.worker))
        requests = Counter("dsv3_requests", "Answers by status.", ["status"], registry=registry)
        seconds = Histogram("dsv3_request_seconds", "From request to end of answer.", registry=registry)

        def guarded(handle: Callable) -> Callable:
            async def run(http: HttpRequest) -> Response:
                start = asyncio.get_running_loop().time()
                try:
                    self._allow(http)
                    response = await handle(http)
                except Wrong as wrong:
                    retry = {"Retry-After": "1"} if wrong.status in (429, 503) else None
                    body = schema.error(str(wrong), wrong.kind)
                    response = JSONResponse(body, wrong.status, headers=retry)
                except ClientDisconnect:
                    response = Response(status_code=499)
                requests.labels(str(response.status_code)).inc()
                seconds.observe(asyncio.get_running_loop().time() - start)
                return response

            return run

        async def metrics(_: HttpRequest) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        async def page(_: HttpRequest) -> Response:
            return HTMLResponse(PAGE)

        routes = [
            Route("/", page),
            Route("/health", self._health),
            Route("/metrics", metrics),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/completions", guarded(self._complete), methods=["POST"]),
            Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _health(self, _: HttpRequest) -> Response:
        load = self.worker.load
        body = {"status": "ok", "active": load.active, "waiting": load.waiting}
        if self.worker.healthy:
            return JSONResponse(body)
        return JSONResponse(body | {"status": "stopping"}, 503)

    async def _models(self, _: HttpRequest) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "dsv3_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    def _allow(self, http: HttpRequest) -> None:
        if self.key is None:
            return
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Wrong(401, "The API key is not right: send it as Authorization: Bearer KEY.", "auth_error")

    async def _complete(self, http: HttpRequest) -> Response:
        asked = Completion(**await self._body(http, Completion))

        def encode() -> list[list[int]]:
            words = asked.prompts
            return [[*self.bos, *self.text.encode(p).tolist()] if isinstance(p, str) else p for p in words]

        prompts = await asyncio.to_thread(encode)  # a long text must not hold up the others
        show = answers.completion if asked.logprobs is None else answers.completion_with_logprobs
        return await self._answer(http, asked, prompts, asked.max_tokens, "text_completion", show)

    async def _chat(self, http: HttpRequest) -> Response:
        asked = Chat(**await self._body(http, Chat))
        template = self.template
        if template is None:
            raise Wrong(400, "This checkpoint has no chat template: ask /v1/completions instead.")

        def encode() -> list[int]:
            words = template([message.model_dump() for message in asked.messages])
            return self.text.encode_marked(words).tolist()

        try:
            prompt = await asyncio.to_thread(encode)
        except ValueError as error:
            raise Wrong(400, str(error)) from None
        most = asked.max_completion_tokens or asked.max_tokens or max(1, self.limits.length - len(prompt))
        return await self._answer(http, asked, [prompt], most, "chat.completion", answers.chat)

    async def _body(self, http: HttpRequest, kind: type[Options]) -> dict[str, Any]:
        """The object that was sent, checked."""
        body = b""
        try:
            async with asyncio.timeout(_BODY):
                async for piece in http.stream():
                    body += piece
                    if len(body) > self.limits.body_bytes:
                        raise Wrong(
                            413, f"The request has more than {self.limits.body_bytes} bytes: send less."
                        )
        except TimeoutError:
            raise Wrong(408, f"The request did not arrive within {_BODY} s: send it again.") from None
        try:
            found = json.loads(body)
            json.dumps(found, ensure_ascii=False).encode()  # halves of characters are no text
            kind.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the request"
            raise Wrong(400, f"{place}: {first['msg']}.") from None
        except (ValueError, RecursionError) as error:
            raise Wrong(400, f"The request is not JSON ({error}): send an object.") from None
        if found.get("model") not in (None, "", self.name):
            raise Wrong(404, f"There is no model {found['model']!r} here, only {self.name!r}.", "not_found")
        return found

    async def _answer(
        self, http: HttpRequest, asked: Options, prompts: list, most: int, kind: str, show: Callable
    ) -> Response:
        """Runs every prompt as often as is asked for."""
        ids = [p for p in prompts for _ in range(asked.n)]
        for prompt in prompts:
            if len(prompt) + most > self.limits.length or not prompt:
                raise Wrong(
                    400,
                    f"A prompt of {len(prompt)} tokens and {most} to come are not within 1 to "
                    f"{self.limits.length}: change the prompt, or ask for fewer tokens.",
                )
        ends = () if asked.ignore_eos else (self.text.eos,)
        choices = [Choice(Stream(self.text, asked.stops), ends) for _ in ids]
        news: asyncio.Queue[tuple[int, News | Exception]] = asyncio.Queue()
        self._submit(asked, ids, most, choices, news)
        spoken = self._pieces(http, choices, news)
        head = schema.envelope(kind, self.name)
        count = schema.usage(sum(map(len, prompts)), 0)["prompt_tokens"]
        if asked.stream:
            first = await anext(spoken)  # what is wrong with the request is said with a status
            lines = answers.events(head, asked, choices, first, spoken, show, count)
            return StreamingResponse(lines, media_type="text/event-stream")
        async for _ in spoken:
            pass
        head["choices"] = [show(n, choice, choice.stream.text) for n, choice in enumerate(choices)]
        given = sum(len(choice.tokens) for choice in choices)
        return JSONResponse(head | {"usage": schema.usage(count, given)})

    def _submit(self, asked: Options, ids: list, most: int, choices: list[Choice], news) -> None:
        loop = asyncio.get_running_loop()
        seed = int.from_bytes(os.urandom(4)) if asked.seed is None else asked.seed
        options = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
        for n, prompt in enumerate(ids):

            def listen(found: News | Exception, n: int = n) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(news.put_nowait, (n, found))

            request = Request(prompt=prompt, most=most, ends=choices[n].ends, seed=seed + n, **options)
            try:
                choices[n].cancel = self.worker.submit(request, listen)
            except (Full, Stopped) as error:
                for choice in choices:
                    choice.cancel()
                if isinstance(error, Full):
                    raise Wrong(429, "Too many requests wait: try again later.", "overloaded") from None
                raise Wrong(503, "The server is stopping: try again later.", "stopping") from None

    async def _pieces(self, http: HttpRequest, choices: list[Choice], news) -> AsyncIterator[tuple[int, str]]:
        """Text as it comes, until all choices have ended; whatever happens, none goes on after that."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.limits.seconds
        try:
            while any(choice.reason is None for choice in choices):
                try:
                    n, found = await asyncio.wait_for(news.get(), _POLL)
                except TimeoutError:
                    if await http.is_disconnected():
                        raise ClientDisconnect from None
                    if loop.time() > end:
                        raise Wrong(504, f"The answer took longer than {self.limits.seconds} s.") from None
                    continue
                if isinstance(found, ValueError):
                    raise Wrong(400, str(found))
                if isinstance(found, Exception):
                    raise Wrong(503, "The server is stopping: try again later.", "stopping")
                if choices[n].reason is None:
                    yield n, choices[n].take(found)
        finally:
            for choice in choices:
                choice.cancel()


class _Gauges(Collector):
    """What the engine does, read when it is asked for."""

    def __init__(self, worker: Worker):
        """Of this worker."""
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """In Prometheus's form."""
        load = self._worker.load
        for name, value, words in (
            ("active", load.active, "Texts that are written."),
            ("waiting", load.waiting, "Requests without a slot."),
        ):
            yield GaugeMetricFamily(f"dsv3_{name}", words, value)
        for name, value in load.counts._asdict().items():
            yield CounterMetricFamily(f"dsv3_{name}", f"{name} so far.".replace("_", " ").capitalize(), value)
