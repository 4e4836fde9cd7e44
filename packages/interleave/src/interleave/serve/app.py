"""The HTTP application, the same for both engines: it authorizes, admits, checks and answers requests.

    POST /v1/generate   {"prompt", "images": [base64], "seed", "params": {}}
                        ->  {"image": base64, "seed", "seconds", "model"}
    GET /healthz  /readyz  /metrics  /v1/info

An error is {"error": {"kind", "message"}}, which repeats nothing of the request.
"""

import asyncio
import base64
import codecs
import hashlib
import hmac
import json
import math
import string
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Le
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from imgen_common.errors import UserError
from interleave.models.generators.pipeline import GenerationSettings
from interleave.models.remote import read_base64
from interleave.serve import local_hosts
from interleave.serve.config import ServeConfig
from interleave.serve.decoding import Decoders, NoDecoderError
from interleave.serve.metrics import Metrics
from interleave.serve.worker import Backend, GenerationFailure, GenerationResult, GenerationTask, ModelInfo, RawImage

if TYPE_CHECKING:
    from fastapi import FastAPI

T = TypeVar("T")
CLIENT_LEFT = 499
STATUS: Mapping[str, int] = {"refused": 422, "rate_limited": 429, "not_ready": 503, "timeout": 504}
"""HTTP status of a failure by its kind; 500 for other kinds."""
MAX_RETRY_AFTER = 60
BASE64 = (string.ascii_letters + string.digits + "+/=").encode()


class GenerateBody(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: str
    images: tuple[str, ...] = ()
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    params: GenerationSettings = GenerationSettings()


class ErrorAnswer(Exception):
    """An answer other than an image."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


class GenerationService:
    """Admits requests, reads them, waits for their images, and drops those whose client is gone."""

    def __init__(self, config: ServeConfig, backend: Backend, metrics: Metrics, secret: bytes | None) -> None:
        self._config, self._backend, self._metrics, self._secret = config, backend, metrics, secret
        self.decoders = Decoders(config.num_decoders, config.decode_timeout, config.max_pixels)
        self._num_admitted = self._num_tasks = 0
        self._latest_seconds = 1.0

    async def generate(self, request: Request) -> Response:
        """POST /v1/generate."""
        started = time.monotonic()
        status: int = CLIENT_LEFT
        try:
            response = await self._generate(request)
            status = response.status_code
            self._latest_seconds = time.monotonic() - started
            self._metrics.seconds.observe(self._latest_seconds)
        except ErrorAnswer as error:
            status = error.status
            raise
        except asyncio.CancelledError as canceled:
            if "shutdown" not in str(canceled):  # uvicorn's words once shutdown_timeout is over; Ray: the client left
                raise
            status = HTTPStatus.SERVICE_UNAVAILABLE
            raise ErrorAnswer(status, "not_ready", "the service is stopping; ask again later") from None
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise
        finally:
            self._metrics.requests.labels(int(status)).inc()
            if status in (CLIENT_LEFT, HTTPStatus.GATEWAY_TIMEOUT):
                self._metrics.cancelled.inc()
        return response

    async def ready(self, request: Request) -> Response:
        """GET /readyz; the reason is shown to authorized clients only."""
        reason = self._backend.not_ready_reason
        if reason is None:
            return _json_response({"ready": True})
        raise ErrorAnswer(503, "not_ready", reason if self._is_authorized(request) else "not ready")

    async def info(self, request: Request) -> Response:
        """GET /v1/info."""
        self._authorize(request)
        info = self._model_info()
        limits = {"max_body_bytes", "max_pixels", "max_prompt_chars", "max_num_inference_steps", "max_side", "deadline"}
        queue = {"waiting": self._num_waiting, "running": self._backend.num_running, "max": self._config.max_queue}
        return _json_response(
            {
                "model": info.model,
                "params": info.params,
                "max_sources": info.max_sources,
                "settings": self._config.settings,
                "limits": self._config.model_dump(include=limits),
                "queue": queue,
            }
        )

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self._authorize(request)
        self._metrics.queue.set(self._num_waiting)
        self._metrics.running.set(self._backend.num_running)
        self._metrics.ready.set(self._backend.not_ready_reason is None)
        return Response(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @property
    def _num_waiting(self) -> int:
        return max(0, self._num_tasks - self._backend.num_running)

    # --- admission ---

    def _is_authorized(self, request: Request) -> bool:
        if self._secret is None:
            return True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(digest(token.strip()), self._secret) and scheme.lower() == "bearer"

    def _authorize(self, request: Request) -> None:
        if not self._is_authorized(request):
            raise ErrorAnswer(401, "unauthorized", "wrong or no bearer token", {"WWW-Authenticate": "Bearer"})

    def _model_info(self) -> ModelInfo:
        """The model, also while its worker is being replaced.  Raises ServiceError where there is none."""
        info = self._backend.model_info
        if info is None:
            raise ErrorAnswer(503, "not_ready", self._backend.not_ready_reason or "not ready", self._retry_after())
        return info

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(min(max(1, math.ceil(self._latest_seconds)), MAX_RETRY_AFTER))}

    async def _generate(self, request: Request) -> Response:
        self._authorize(request)
        info = self._model_info()
        if self._num_admitted >= self._config.max_queue + self._backend.capacity:
            raise ErrorAnswer(429, "rate_limited", "the queue is full; ask again later", self._retry_after())
        seconds = self._read_deadline(request)
        self._num_admitted += 1
        try:
            async with asyncio.timeout(seconds):
                body = await self._read_body(request)
                task, result = await _unless_client_leaves(request, self._run_task(body, info))
        except TimeoutError:
            is_asked = seconds < self._config.deadline
            remedy = "give a longer X-Deadline-Seconds (interleave: retry.timeout and retry.deadline)"
            remedy = remedy if is_asked else "raise the service's own deadline"
            raise ErrorAnswer(504, "timeout", f"the image was not ready within {seconds:g} s; {remedy}") from None
        except ClientDisconnect:
            raise ErrorAnswer(CLIENT_LEFT, "client_left", "the client left") from None
        finally:
            self._num_admitted -= 1
        image = base64.b64encode(result.png).decode()
        return _json_response({"image": image, "seed": task.seed, "seconds": result.seconds, "model": info.model})

    def _read_deadline(self, request: Request) -> float:
        given = request.headers.get("x-deadline-seconds")
        try:
            seconds = self._config.deadline if given is None else float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ErrorAnswer(400, "bad_header", "X-Deadline-Seconds: must be a number above 0")
        return min(seconds, self._config.deadline)

    # --- reading ---

    async def _read_body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ErrorAnswer(415, "bad_request", "Content-Type: must be application/json")
        if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
            raise ErrorAnswer(415, "bad_request", f"Content-Encoding: must be none, not {encoding[:40]!r}")
        limit = self._config.max_body_bytes
        too_large = ErrorAnswer(413, "too_large", f"the body has more than the allowed {limit} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ErrorAnswer(408, "timeout", "the body did not arrive in time") from None
        return bytes(body)

    def _parse_body(self, body: bytes, info: ModelInfo) -> tuple[GenerateBody, dict[str, Any]]:
        """A request's body and the settings that it gives.  Raises ErrorAnswer."""
        limit = 4096 + 16 * self._config.max_prompt_chars
        if len(body.translate(None, BASE64)) > limit:  # millions of keys or numbers would stop the service for seconds
            raise ErrorAnswer(413, "too_large", f"the body has more than the allowed {limit} bytes besides base64")
        try:
            parsed = GenerateBody.model_validate_json(body.removeprefix(codecs.BOM_UTF8), strict=True)
        except ValidationError as error:
            raise _validation_error(error) from None
        for name, text in (("prompt", parsed.prompt), ("params.negative_prompt", parsed.params.negative_prompt or "")):
            if len(text) > self._config.max_prompt_chars:
                raise _invalid_body(f"{name}: more than the allowed {self._config.max_prompt_chars} characters")
        if len(parsed.images) > info.max_sources:
            raise _invalid_body(f"images: {len(parsed.images)}; {info.model} takes {info.max_sources} at most")
        return parsed, self._check_settings(parsed.params)

    async def _decode_image(self, index: int, text: str) -> RawImage:
        try:
            return await self.decoders.decode(await asyncio.to_thread(read_base64, text))
        except ValueError:  # binascii.Error is one, and so is a letter beyond ASCII
            raise _invalid_body(f"images.{index}: not base64") from None
        except UserError as error:
            raise _invalid_body(f"images.{index}: {error}") from None
        except NoDecoderError:
            message = "no process can be started that reads the image; ask again later"
            raise ErrorAnswer(503, "not_ready", message, self._retry_after()) from None

    def _check_settings(self, params: GenerationSettings) -> dict[str, Any]:
        given = params.model_dump(exclude_none=True)
        most = {"num_inference_steps": self._config.max_num_inference_steps} | dict.fromkeys(
            ("height", "width"), self._config.max_side
        )
        for name, value in given.items():
            if name not in self._config.settings:
                raise _invalid_body(f"params.{name}: set by the service; allowed: {', '.join(self._config.settings)}")
            if name in most and value > most[name]:
                raise _invalid_body(f"params.{name}: must be at most {most[name]}")
        return given

    # --- generation ---

    async def _run_task(self, body: bytes, info: ModelInfo) -> tuple[GenerationTask, GenerationResult]:
        """The task in a request's body, and its image.  Canceled, the task is dropped."""
        parsed, settings = await asyncio.to_thread(self._parse_body, body, info)
        images = [await self._decode_image(i, text) for i, text in enumerate(parsed.images)]
        task = GenerationTask(parsed.prompt, tuple(images), parsed.seed, settings)
        self._num_tasks += 1
        try:
            answer = await self._backend.generate(task)
        finally:
            self._num_tasks -= 1
        match answer:
            case GenerationFailure(kind, message):
                headers = self._retry_after() if kind in ("rate_limited", "not_ready") else None
                raise ErrorAnswer(STATUS.get(kind, 500), kind, message, headers)
            case GenerationResult() as result:
                self._metrics.generation_seconds.observe(result.seconds)
                for size in result.batches:
                    self._metrics.batch_size.observe(size)
                return task, result


def create_app(config: ServeConfig, backend: Backend, metrics: Metrics, secret: bytes | None) -> "FastAPI":
    """The application.  secret: `digest` of the token that requests must carry; None: they need none."""
    from fastapi import FastAPI

    service = GenerationService(config, backend, metrics, secret)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        try:
            yield
        finally:
            service.decoders.stop()
            await backend.stop()

    app = FastAPI(title="interleave generator", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_route("/v1/generate", service.generate, methods=["POST"])
    app.add_route("/v1/info", service.info)
    app.add_route("/healthz", _health)
    app.add_route("/readyz", service.ready)
    app.add_route("/metrics", service.metrics)
    if secret is None:
        hosts = local_hosts(config.host, config.allowed_hosts)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    for kind in (ErrorAnswer, HTTPException, Exception):
        app.add_exception_handler(kind, _handle_error)
    return app


def digest(token: str) -> bytes:
    """sha256 of a token, which the service keeps instead of the token and compares in constant time."""
    return hashlib.sha256(token.encode()).digest()


async def _health(request: Request) -> Response:
    return _json_response({"alive": True})


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ErrorAnswer(error.status_code, "bad_request", error.detail, error.headers)
    elif not isinstance(error, ErrorAnswer):
        error = ErrorAnswer(500, "internal", "the service failed; see its log")
    return _json_response({"error": {"kind": error.kind, "message": str(error)}}, error.status, error.headers)


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is canceled when the client disconnects.  Raises ClientDisconnect."""
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if disconnect.done():
            raise ClientDisconnect
    finally:
        working.cancel()
        disconnect.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)
    return working.result()


async def _wait_for_disconnect(request: Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _invalid_body(message: str) -> ErrorAnswer:
    return ErrorAnswer(422, "invalid", message)


def _validation_error(error: ValidationError) -> ErrorAnswer:
    """The first mistake in a body by its place, without the value given there."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ErrorAnswer(400, "not_json", "the body is not JSON")
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = GenerationSettings if where[0] == "params" else GenerateBody
        return _invalid_body(
            f"{'.'.join(where[:-1]) or 'the body'}: unknown key; allowed: {', '.join(known.model_fields)}"
        )
    return _invalid_body(f"{'.'.join(where) or 'the body'}: {first['msg']}")
