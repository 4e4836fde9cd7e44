"""Any OpenAI-compatible chat endpoint: vLLM, `transformers serve`, or a hosted model."""

import asyncio
import base64
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from imgen_common.config import Config
from imgen_common.errors import UserError
from interleave.generators import http
from interleave.parts import FailureKind, Message, PartFailed, Reply
from interleave.resilience import Caller, CallerConfig, Transient

if TYPE_CHECKING:
    import httpx

BUSY = (408, 409, 425, 429, 503)
NO_SERVER = (502, 504)
"""Statuses by which a gateway says that nothing answers behind it."""


class EndpointChatConfig(Config):
    """An OpenAI-compatible endpoint."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = "http://127.0.0.1:8000/v1"
    """Address up to the version."""
    model: str = "default"
    """Name by which the server knows the model."""
    key_env: str = "INTERLEAVE_API_KEY"
    """Variable of the environment that holds the key; nothing is sent where it is not set."""
    max_new_tokens: Annotated[int, Ge(1)] = 4096
    """Longest answer in tokens."""
    temperature: Annotated[float, Ge(0), Le(2)] = 0.7
    """0: the most probable answer."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.8
    """Share of the probability mass that is sampled from."""
    send_seed: bool = True
    """Whether seeds are sent; some hosted models refuse them."""
    top_logprobs: Annotated[int, Ge(0), Le(20)] = 0
    """How many alternatives per token are asked for; needed for `best_by_verdict_probability`."""
    extra: Mapping[str, Any] = {}
    """Further keys of the request, as the server names them; null leaves one out (`max_tokens: null`)."""
    calls: CallerConfig = CallerConfig()
    """How patiently it is called."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 8 * 2**20
    """Largest answer that is read."""


class EndpointChat:
    """Chat completions over HTTP.

    The key is read from the environment once and goes to this host only: redirects are refusals, and no message shows
    it, not even where the server repeats it.
    """

    def __init__(self, config: EndpointChatConfig, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        """transport: for tests.  Raises UserError for an address that is none, or a key that no header can carry."""
        self._config, self._transport = config, transport
        self._url, self._headers = http.checked(config.url), http.bearer(config.key_env)
        self._caller = Caller(config.calls, name=self._url)
        self._client: httpx.AsyncClient | None = None

    @property
    def id(self) -> str:
        """Model name and settings that answers depend on."""
        c = self._config
        extra = f" {json.dumps(dict(c.extra), sort_keys=True)}" if c.extra else ""
        return f"{c.model} t={c.temperature:g} p={c.top_p:g} n={c.max_new_tokens}{extra}"

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer.  Raises PartFailed."""
        body = await asyncio.to_thread(self._body, message, seed)
        return await self._caller.call(lambda left: self._send(body, left))

    async def check(self) -> None:
        """Ask for a few tokens.  Raises UserError that says what to mend where no answer can come."""
        c = self._config
        limit = "max_completion_tokens" if "max_completion_tokens" in c.extra else "max_tokens"
        body = {"model": c.model, "messages": [{"role": "user", "content": "Say yes."}], limit: 16}
        try:
            async with asyncio.timeout(c.calls.timeout):
                await self._send(json.dumps(body).encode(), c.calls.timeout)
        except (PartFailed, Transient, TimeoutError) as failure:
            if isinstance(failure, Transient) and failure.kind == "overloaded":
                return
            said = str(failure) or f"{self._url}: no answer within {c.calls.timeout:g} s"
            remedy = f"start the server, or mend url, model ({c.model!r}) or the key in {c.key_env}"
            raise UserError(f"chat endpoint {said}; {remedy}") from None

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _open(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx

            limits = httpx.Limits(max_connections=self._config.calls.concurrency)
            self._client = httpx.AsyncClient(
                headers=self._headers, limits=limits, transport=self._transport, follow_redirects=False
            )
        return self._client

    def _body(self, message: Message, seed: int) -> bytes:
        c = self._config
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": _address(http.png(part))}}
            for part in message
        ]
        body: dict[str, Any] = {
            "model": c.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": c.max_new_tokens,
            "temperature": c.temperature,
            "top_p": c.top_p,
        }
        if c.send_seed:
            body["seed"] = seed
        if c.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": c.top_logprobs}
        body |= c.extra
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    async def _send(self, body: bytes, left: float) -> Reply:
        import httpx

        url, headers = f"{self._url}/chat/completions", {"Content-Type": "application/json"}
        try:
            async with self._open().stream(
                "POST", url, content=body, headers=headers, timeout=http.within(left)
            ) as answer:
                data = await http.read(answer, self._config.max_answer_bytes)
        except httpx.ReadTimeout:
            raise Transient("deadline", f"{self._url}: no answer within {left:.3g} s") from None
        except httpx.HTTPError as error:
            reason = http.line(str(error)) or type(error).__name__
            raise Transient("unreachable", f"{self._url}: cannot be reached ({reason})") from None
        self._raise_for(answer, data)
        try:
            return read_reply(data)
        except Transient as failure:
            raise Transient(failure.kind, f"{self._url}: {http.line(str(failure), self._headers)}") from None

    def _raise_for(self, answer: "httpx.Response", data: bytes) -> None:
        """Raises for every status but success."""
        status, said = answer.status_code, _message(data)
        if status < 300:
            return
        what = f"{self._url}: status {status}: {http.line(said, self._headers)}"
        if status in BUSY or status >= 500:
            kind: FailureKind = "overloaded" if status in BUSY else "unreachable" if status in NO_SERVER else "broken"
            raise Transient(kind, what, http.retry_after(answer.headers))
        if status < 400:
            what += f"; it points to {http.line(answer.headers.get('location', 'nowhere'))}: give that address as url"
        if status in (401, 403):
            what += f"; set {self._config.key_env} to a valid key"
        raise PartFailed("refused", what)


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _message(data: bytes) -> str:
    """What an error's body says, as servers write it: `{"error": {"message": ...}}`, `{"detail": ...}`, or text."""
    text = data.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        said = said[name] if isinstance(said, dict) and name in said else said
    return said if isinstance(said, str) else text


def read_reply(data: bytes) -> Reply:
    """The reply in a chat completion; what a server split off as reasoning goes back into `<think>`.

    Raises Transient, `garbage`, for what is no chat completion.
    """
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        truncated = choice.get("finish_reason") == "length"
        usage = answer.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        return Reply(
            text=_text(choice["message"], truncated),
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            num_completion_tokens=int(usage.get("completion_tokens") or 0),
            truncated=truncated,
            token_probabilities=tuple((str(t["token"]), _alternatives(t)) for t in tokens),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Transient("garbage", f"not a chat completion ({type(error).__name__}: {error})") from None


def _alternatives(token: Mapping[str, Any]) -> dict[str, float]:
    return {str(other["token"]): math.exp(other["logprob"]) for other in token.get("top_logprobs") or ()}


def _text(message: Mapping[str, Any], truncated: bool) -> str:
    content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is None and (truncated or thought):
        content = ""
    if not isinstance(content, str):
        raise TypeError("no text in it")
    return f"<think>{thought}</think>{content}" if isinstance(thought, str) and "<think>" not in content else content
