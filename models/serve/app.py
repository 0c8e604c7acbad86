"""The answers over HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.networks.messages import suggest
from models.serve.metrics import Metrics
from models.serve.refusals import Refused
from models.serve.scenes import Question, Scenes
from models.serve.uploads import Part, check_type, discard, read_form
from models.serve.worker import Worker

_LOG = logging.getLogger(__name__)
_READ_SECONDS = 60.0
_GONE = 499  # nobody gets to see it but the metrics; nginx counts clients that left so
_FOLDER = Path(__file__).parent
_FILES = {"/": "page.html", "/style.css": "style.css", "/script.js": "script.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_SETTINGS = ("theta", "unplug", "example")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What is taken at a time.

    Attributes:
        upload_mb: of a request's files together, in units of 2**20 bytes.
        megapixels: of an image.
        queue: how many requests may upload or wait while one is worked on.
    """

    upload_mb: float = 32.0
    megapixels: float = 4.0
    queue: int = 32

    @property
    def bytes(self) -> int:
        return int(self.upload_mb * 2**20)

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)


class Service:
    """Requests in, answers out; all of it in one thread but for the network.

    Args:
        scenes: the network.
        limits: of requests.

    Attributes:
        on_idle: called when the service is stopping and nothing is left to answer.
    """

    def __init__(self, scenes: Scenes, limits: Limits) -> None:
        self.scenes, self.limits = scenes, limits
        self.worker, self.metrics = Worker(), Metrics()
        self.on_idle: Callable[[], None] = lambda: None
        self._examples: list[dict[str, Any]] | None = None
        self._stopping = False
        self._admitted = 0

    def stop(self) -> None:
        """Take no further questions; ``on_idle`` is called once those that were taken are answered."""
        self._stopping = True
        self._report_idle()

    def app(self) -> Any:
        """The ASGI application."""
        routes = [
            *(Route(path, self._file) for path in _FILES),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
            Route("/api/model", self._model),
            Route("/api/examples", self._list_examples),
            Route("/api/predict", self._predict, methods=["POST"]),
        ]
        known = {route.path for route in routes}
        return self._counted(Starlette(routes=routes), known)

    def _counted(self, app: Any, known: set[str]) -> Any:
        """The application with every answer counted, and the headers that all answers have."""
        added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            async def send_counted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in known else "other"
                    self.metrics.count(path, message["status"])
                    message = message | {"headers": [*message.get("headers", []), *added]}
                await send(message)

            await app(scope, receive, send_counted if scope["type"] == "http" else send)

        return counted

    async def _file(self, request: Request) -> Response:
        path = _FOLDER / _FILES[request.url.path]
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix])

    async def _health(self, request: Request) -> Response:
        state = "stopping" if self._stopping else "ready"
        return JSONResponse({"status": state}, 503 if self._stopping else 200)

    async def _metrics(self, request: Request) -> Response:
        gauges = {
            "cen_queue_length": ("Requests that wait for the network.", self.worker.waiting),
            "cen_requests_in_flight": ("Requests that upload, wait or are worked on.", self._admitted),
        }
        return Response(self.metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self.scenes.describe())

    async def _list_examples(self, request: Request) -> Response:
        if self._examples is None:
            self._examples = await asyncio.wrap_future(self.worker.submit(self.scenes.thumbnails))
        return JSONResponse(self._examples)

    async def _predict(self, request: Request) -> Response:
        started = time.perf_counter()
        body: AsyncIterator[bytes] = request.stream()
        try:
            if why := self._why_not():
                await asyncio.wait_for(discard(body, self.limits.bytes), _READ_SECONDS)
                return _error(503, why, {"Retry-After": str(self._seconds_to_wait())})
            self._admitted += 1
            try:
                return await self._answer(request, body, started)
            finally:
                self._admitted -= 1
                self._report_idle()
        except Refused as refused:
            return _error(refused.status, refused.message)
        except (ClientDisconnect, asyncio.TimeoutError):
            return Response(status_code=_GONE)
        except Exception:
            _LOG.exception("a request failed")
            return _error(500, "the server failed at this request; its log says how")

    async def _answer(self, request: Request, body: AsyncIterator[bytes], started: float) -> Response:
        content_type = request.headers.get("content-type", "")
        parts = await read_form(content_type, body, self.limits.bytes, _READ_SECONDS)
        question = self._question(parts, request.query_params.get("images", "true"))
        submitted = time.perf_counter()
        found = await _unless_gone(
            self.worker, self.worker.submit(partial(self.scenes.answer, question)), request.receive
        )
        waited = time.perf_counter() - submitted - sum(found["seconds"].values())
        found["seconds"] = {
            "upload": submitted - started,
            "queue": max(0.0, waited),
            **found["seconds"],
        }
        self.metrics.observe(time.perf_counter() - started)
        return JSONResponse(found)

    def _question(self, parts: Sequence[Part], images: str) -> Question:
        """What a form asks.

        Raises:
            Refused: 415 a file of another type; 422 a field that is unknown, given twice or wrong.
        """
        kinds = self.scenes.kinds
        uploads: dict[str, tuple[str, bytes]] = {}
        settings: dict[str, str] = {}
        for part in parts:
            if part.name not in (*kinds, *_SETTINGS):
                hint = suggest(part.name, (*kinds, *_SETTINGS))
                raise Refused(422, f"unknown field {part.name!r}: expected {', '.join(kinds)}{hint}")
            if part.name in uploads or part.name in settings:
                raise Refused(422, f"{part.name} is given twice")
            if part.name in _SETTINGS:
                settings[part.name] = part.data.decode("utf-8", "replace").strip()
            elif part.given:
                name = f"{part.name} ({part.filename})" if part.filename else part.name
                uploads[part.name] = (name, data := bytes(part.data))
                check_type(name, data)
        unplugged = (name.strip() for name in settings.get("unplug", "").split(","))
        return Question(
            uploads,
            _number(int, "example", settings),
            _number(float, "theta", settings),
            tuple(filter(None, unplugged)),
            _flag("images", images),
        )

    def _why_not(self) -> str | None:
        """A reason why no further question is taken now."""
        if self._stopping:
            return "the server is stopping"
        if self._admitted > self.limits.queue:
            return f"the queue of {self.limits.queue} is full"
        return None

    def _seconds_to_wait(self) -> int:
        """When half of the queue will have been answered, by the last answer's time."""
        return max(1, math.ceil(self.worker.pace * self._admitted / 2))

    def _report_idle(self) -> None:
        if self._stopping and not self._admitted:
            self.on_idle()


async def _unless_gone(worker: Worker, future: Future[Any], receive: Callable[[], Awaitable[Any]]) -> Any:
    """What a future brings, unless the client leaves before: then it is taken out of the line.

    Raises:
        ClientDisconnect: the client has left.
    """
    answer: asyncio.Future[Any] = asyncio.wrap_future(future)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        worker.drop(future)
        raise ClientDisconnect
    finally:
        left.cancel()
        answer.cancel()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _number(kind: type[Any], name: str, settings: dict[str, str]) -> Any:
    if not (text := settings.get(name, "")):
        return None
    try:
        return kind(text)
    except ValueError:
        raise Refused(422, f"{name} must be a number, got {text[:40]!r}") from None


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise Refused(422, f"{name} must be true or false, got {text[:40]!r}")
    return text == "true"
