"""The HTTP side of the service, the same for every engine: who may ask, for how much, and what is answered.

    POST /v1/generate   {"prompt", "images": [base64], "seed", "params": {}}
                        ->  {"image": base64, "seed", "seconds", "model"}
    GET /healthz  /readyz  /metrics  /v1/info

An error is {"error": {"kind", "message"}}; it repeats nothing of the request.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.models.generators.pipeline import GenerationSettings
from interleave.serve.config import ServeConfig
from interleave.serve.metrics import Metrics
from interleave.serve.studio import About, Backend, Drawn, Failed, Task

if TYPE_CHECKING:
    from fastapi import FastAPI

CLIENT_LEFT = 499
OUT_OF_TIME = 504
STATUS: Mapping[str, int] = {"refused": 422, "rate_limited": 429, "not_ready": 503, "timeout": 504}
"""Of a failed picture; 500 for other kinds."""
LONGEST_RETRY_AFTER = 60


class Asked(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: str
    images: tuple[str, ...] = ()
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    params: GenerationSettings = GenerationSettings()


class Problem(Exception):
    """An answer other than a picture."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self) -> Response:
        """As JSON."""
        return _json({"error": {"kind": self.kind, "message": str(self)}}, self.status, self.headers)


class Front:
    """Lets requests in, reads them, waits for their pictures, and drops those that nobody waits for."""

    def __init__(self, config: ServeConfig, backend: Backend, metrics: Metrics, secret: bytes | None) -> None:
        self._config, self._backend, self._metrics, self._secret = config, backend, metrics, secret
        self._num_inside = self._num_drawing = 0
        self._latest_seconds = 1.0

    async def generate(self, request: Request) -> Response:
        """POST /v1/generate."""
        started = time.monotonic()
        status = CLIENT_LEFT
        try:
            response = await self._generate(request)
            status = response.status_code
            self._latest_seconds = time.monotonic() - started
            self._metrics.seconds.observe(self._latest_seconds)
        except Problem as problem:
            status = problem.status
            raise
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise
        finally:
            self._metrics.requests.labels(int(status)).inc()
            if status in (CLIENT_LEFT, OUT_OF_TIME):
                self._metrics.cancelled.inc()
        return response

    async def ready(self, request: Request) -> Response:
        """GET /readyz: why not only to those who may ask for pictures."""
        trouble = self._backend.trouble
        if trouble is None:
            return _json({"ready": True})
        raise Problem(503, "not_ready", trouble if self._is_allowed(request) else "not ready")

    async def info(self, request: Request) -> Response:
        """GET /v1/info."""
        self._authorise(request)
        about, limits = self._about(), {"max_body_bytes", "max_pixels", "max_prompt_chars", "max_steps", "max_side"}
        queue = {"waiting": self._num_waiting, "running": self._backend.num_running, "max": self._config.max_queue}
        return _json(
            {
                "model": about.model,
                "params": about.params,
                "max_sources": about.max_sources,
                "settings": self._config.settings,
                "limits": self._config.model_dump(include=limits | {"deadline"}),
                "queue": queue,
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self._authorise(request)
        self._metrics.queue.set(self._num_waiting)
        self._metrics.running.set(self._backend.num_running)
        self._metrics.ready.set(self._backend.trouble is None)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @property
    def _num_waiting(self) -> int:
        return max(0, self._num_drawing - self._backend.num_running)

    # --- letting in ---

    def _is_allowed(self, request: Request) -> bool:
        if self._secret is None:
            return True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(digest(token.strip()), self._secret) and scheme.lower() == "bearer"

    def _authorise(self, request: Request) -> None:
        if not self._is_allowed(request):
            raise Problem(401, "unauthorised", "wrong or no bearer token", {"WWW-Authenticate": "Bearer"})

    def _about(self) -> About:
        """The model, also while its worker is being replaced.  Raises Problem where there is none."""
        about = self._backend.about
        if about is None:
            raise Problem(503, "not_ready", self._backend.trouble or "not ready", self._retry_after())
        return about

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(min(max(1, math.ceil(self._latest_seconds)), LONGEST_RETRY_AFTER))}

    async def _generate(self, request: Request) -> Response:
        self._authorise(request)
        about = self._about()
        if self._num_inside >= self._config.max_queue + self._backend.capacity:
            raise Problem(429, "rate_limited", "the queue is full; ask again later", self._retry_after())
        self._num_inside += 1
        try:
            async with asyncio.timeout(self._seconds_for(request)):
                body = await self._body(request)
                task = await asyncio.to_thread(self._task, body, about)
                drawn = await self._draw(request, task)
        except TimeoutError:
            raise Problem(OUT_OF_TIME, "timeout", "there was no picture in time") from None
        except ClientDisconnect:
            raise Problem(CLIENT_LEFT, "client_left", "the client left") from None
        finally:
            self._num_inside -= 1
        image = base64.b64encode(drawn.png).decode()
        return _json({"image": image, "seed": task.seed, "seconds": drawn.seconds, "model": about.model})

    def _seconds_for(self, request: Request) -> float:
        given = request.headers.get("x-deadline-seconds")
        try:
            seconds = self._config.deadline if given is None else float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise Problem(400, "bad_header", "X-Deadline-Seconds: must be a number above 0")
        return min(seconds, self._config.deadline)

    # --- reading ---

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "bad_request", "Content-Type: must be application/json")
        limit = self._config.max_body_bytes
        too_large = Problem(413, "too_large", f"the body has more than the allowed {limit} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _task(self, body: bytes, about: About) -> Task:
        """What is asked for, checked.  Raises Problem."""
        try:
            asked = Asked.model_validate_json(body, strict=True)
        except ValidationError as error:
            raise _mistake(error) from None
        for name, text in (("prompt", asked.prompt), ("params.negative_prompt", asked.params.negative_prompt or "")):
            if len(text) > self._config.max_prompt_chars:
                raise _invalid(f"{name}: more than the allowed {self._config.max_prompt_chars} characters")
        if len(asked.images) > about.max_sources:
            raise _invalid(f"images: {len(asked.images)}; {about.model} takes {about.max_sources} at most")
        images = tuple(self._image(i, text) for i, text in enumerate(asked.images))
        return Task(asked.prompt, images, asked.seed, self._settings(asked.params))

    def _image(self, index: int, text: str) -> bytes:
        try:
            data = base64.b64decode(text, validate=True)
            decode(data, self._config.max_body_bytes, self._config.max_pixels)
        except binascii.Error:
            raise _invalid(f"images.{index}: not base64") from None
        except UserError as error:
            raise _invalid(f"images.{index}: {error}") from None
        return data

    def _settings(self, params: GenerationSettings) -> dict[str, Any]:
        given = params.model_dump(exclude_none=True)
        most = {"num_inference_steps": self._config.max_steps} | dict.fromkeys(
            ("height", "width"), self._config.max_side
        )
        for name, value in given.items():
            if name not in self._config.settings:
                raise _invalid(f"params.{name}: set by the service; allowed: {', '.join(self._config.settings)}")
            if name in most and value > most[name]:
                raise _invalid(f"params.{name}: must be at most {most[name]}")
        return given

    # --- drawing ---

    async def _draw(self, request: Request, task: Task) -> Drawn:
        """The picture; the task is dropped when time is up or the client leaves."""
        drawing = asyncio.create_task(self._backend.draw(task))
        left = asyncio.create_task(_left(request))
        self._num_drawing += 1
        try:
            await asyncio.wait({drawing, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                raise ClientDisconnect
        finally:
            self._num_drawing -= 1
            drawing.cancel()
            left.cancel()
            await asyncio.gather(drawing, left, return_exceptions=True)
        match drawing.result():
            case Failed(kind, message):
                headers = self._retry_after() if kind in ("rate_limited", "not_ready") else None
                raise Problem(STATUS.get(kind, 500), kind, message, headers)
            case Drawn() as drawn:
                self._metrics.draw_seconds.observe(drawn.seconds)
                for size in drawn.batches:
                    self._metrics.batch_size.observe(size)
                return drawn


def create_app(config: ServeConfig, backend: Backend, metrics: Metrics, secret: bytes | None) -> "FastAPI":
    """The application.  secret: `digest` of the token that requests must bear; None: they need none."""
    from fastapi import FastAPI

    front = Front(config, backend, metrics, secret)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        try:
            yield
        finally:
            await backend.stop()

    app = FastAPI(title="interleave generator", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_route("/v1/generate", front.generate, methods=["POST"])
    app.add_route("/v1/info", front.info)
    app.add_route("/healthz", _healthy)
    app.add_route("/readyz", front.ready)
    app.add_route("/metrics", front.metrics)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _problem)
    app.add_exception_handler(Exception, _problem)
    return app


def digest(token: str) -> bytes:
    """sha256 of a token: what the service keeps of it, and compares in constant time."""
    return hashlib.sha256(token.encode()).digest()


async def _healthy(request: Request) -> Response:
    return _json({"alive": True})


async def _problem(request: Request, error: Exception) -> Response:
    match error:
        case Problem():
            return error.response()
        case HTTPException():
            return Problem(error.status_code, "bad_request", error.detail, error.headers).response()
        case _:
            return Problem(500, "internal", "the service failed; see its log").response()


async def _left(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _invalid(message: str) -> Problem:
    return Problem(422, "invalid", message)


def _mistake(error: ValidationError) -> Problem:
    """The first mistake in a body, by its place, without what was given there."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return Problem(400, "not_json", "the body is not JSON")
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = GenerationSettings if where[0] == "params" else Asked
        return _invalid(f"{'.'.join(where[:-1]) or 'the body'}: unknown key; allowed: {', '.join(known.model_fields)}")
    return _invalid(f"{'.'.join(where) or 'the body'}: {first['msg']}")
