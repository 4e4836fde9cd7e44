"""Any OpenAI-compatible chat endpoint: vLLM, `transformers serve`, or a hosted model."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from imgen_common.config import NO_SECRETS, ONE_ANSWER, Config, KeyVariable, ServedModel
from imgen_common.errors import UserError, warn_once
from imgen_common.http import HttpClient, HttpError, Refusal, RetryPolicy, ServiceUrl, check_url
from imgen_common.http.chat import ALL_REASONING, NOTHING, complete, encode_body
from imgen_common.http.failures import NO_CREDIT
from interleave.models.remote import backend_errors, data_address
from interleave.protocols import Message, Reply, split_system

if TYPE_CHECKING:
    import httpx


LONGER_CONTEXT = "set max_new_tokens lower, or serve the model with a longer context"
OTHER_TEMPLATE = "name a model whose chat template takes a system turn, also beside images, or serve it with such a one"
REMEDIES = {
    "incompatible with system": OTHER_TEMPLATE,  # Llama 3.2 Vision
    "System role": OTHER_TEMPLATE,  # Gemma 2
    " image": "a critic and a judge show two images in a prompt, and a planner those of a request: serve the model so "
    "(vLLM: --limit-mm-per-prompt), or name one that reads them",
    "enable_thinking": "set extra: {enable_thinking: false}",
    "(?<!up)stream": "answers are read whole here, so that a model which only streams cannot be used; name another one",
    "context length": LONGER_CONTEXT,
    "context size": LONGER_CONTEXT,  # llama.cpp
    "prompt is too long": LONGER_CONTEXT,  # Anthropic
}
"""What to do where a server's words about a request that it does not take match one of these."""
UNKNOWN_MODEL = re.compile(
    r"model not exist|model [^;]{0,80}(?:does not exist|not found)|(?:invalid|unknown|not a valid) model",
    re.IGNORECASE,
)
"""How DeepSeek, Mistral, OpenRouter and others say under status 400 that they have no such model."""


class EndpointChatConfig(Config):
    """An OpenAI-compatible endpoint."""

    renamed: ClassVar = {"calls": "retry, with concurrency beside it"}
    kind: Literal["endpoint"] = "endpoint"
    url: ServiceUrl = "http://127.0.0.1:8000/v1"
    """Address up to the version."""
    model: ServedModel = "default"
    """Name by which the server knows the model."""
    key_env: KeyVariable = "INTERLEAVE_API_KEY"
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
    extra: Annotated[Mapping[str, Any], NO_SECRETS, ONE_ANSWER] = {}
    """Further keys of the request, as the server names them; null leaves one out (`temperature: null`), and
    `max_completion_tokens` takes the place of `max_tokens`.  No keys or passwords: they belong into the environment."""
    concurrency: Annotated[int, Ge(1), Le(10000)] = 16
    """Requests in flight at once."""
    retry: RetryPolicy = RetryPolicy()
    """Timeouts, retries and the circuit breaker."""
    max_answer_bytes: Annotated[int, Ge(1024)] = 8 * 2**20
    """Largest answer that is read."""
    image_detail: Literal["auto", "low", "high"] | None = None
    """How closely the model looks at an image (`detail` of OpenAI's interface); null: nothing is sent."""
    max_pixels: Annotated[int, Ge(1024)] = 2048 * 2048
    """Largest image in pixels; a larger one is sent scaled down."""
    max_image_bytes: Annotated[int, Ge(16384)] = 3_750_000
    """Largest file of an image, which base64 makes a third larger (Anthropic takes 5 MB of that, DashScope 10 MB).
    Where a PNG is larger, a JPEG of quality 95 is sent.  No image of up to 1.2 megapixels is changed by default."""

    def build(self) -> "EndpointChat":
        """The model.  Raises UserError for an address or a key that is none."""
        return EndpointChat(self)


DEFAULTS = EndpointChatConfig.model_fields


class EndpointChat:
    """Chat completions over HTTP; the key goes to this host only."""

    def __init__(self, config: EndpointChatConfig, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        """transport: for tests.  Raises UserError for an address that is none, or a key that no header can carry."""
        self._config, self._url, c = config, check_url(config.url), config
        self._client = HttpClient(self._url, c.key_env, c.retry, c.concurrency, c.max_answer_bytes, transport)
        extra = f" {json.dumps(dict(c.extra), sort_keys=True)}" if c.extra else ""
        shown = ((" px", "max_pixels"), (" bytes", "max_image_bytes"), (" detail", "image_detail"))
        seen = "".join(f"{name}={getattr(c, key)}" for name, key in shown if getattr(c, key) != DEFAULTS[key].default)
        self.id = f"{c.model} t={c.temperature:g} p={c.top_p:g} n={c.max_new_tokens}{seen}{extra}"

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer.  Raises BackendError."""
        body = await asyncio.to_thread(self._body, message, seed)
        with backend_errors():
            return await self._client.call(lambda seconds: self._send(body, seconds))

    async def check(self, message: Message = ("Say yes.",)) -> None:
        """Ask once, with every setting of the run.  Raises UserError that says what to change where none can come."""
        c = self._config
        try:
            async with asyncio.timeout(c.retry.timeout):
                answer = await complete(self._client, self._url, self._body(message, 0), c.retry.timeout)
        except Refusal:
            return  # it answers
        except (HttpError, TimeoutError) as failure:
            if isinstance(failure, HttpError) and (failure.kind == "rate_limited" or failure.status in (503, 529)):
                return  # it is there, only busy
            reason = str(failure) or f"{self._url}: no answer within {c.retry.timeout:g} s"
            remedy = f"start the server, or correct url, model ({c.model!r}) or the key in {c.key_env}"
            if isinstance(failure, HttpError) and failure.status == NO_CREDIT:
                remedy = f"pay for more, or raise the limit of the account whose key is in {c.key_env}"
            elif NOTHING in reason:
                remedy = "run this again; if it does again, raise max_new_tokens or name another model"
            elif UNKNOWN_MODEL.search(reason):
                remedy = f"correct model ({c.model!r}): give its name as the server knows it"
            elif isinstance(failure, HttpError) and failure.status in (400, 422, 500):
                left_out = (
                    "leave out what the model does not take: send_seed: false, top_logprobs: 0, extra: {temperature: "
                    "null, top_p: null}, or extra: {max_completion_tokens: "
                    f"{c.max_new_tokens}}} instead of max_tokens"
                )
                remedies = {"API key": f"set {c.key_env} to a valid key", **REMEDIES}
                otherwise = remedy if failure.status == 500 else left_out
                remedy = next((words for sign, words in remedies.items() if re.search(sign, reason)), otherwise)
            raise UserError(f"chat endpoint {reason}; {remedy}") from None
        if not answer.content.strip() and answer.reasoning and not answer.is_cut_off:
            warn_once(f"chat endpoint {self._url}: {ALL_REASONING}")
        if c.top_logprobs and not answer.token_probabilities:
            raise UserError(
                f"chat endpoint {self._url}: answers without the log-probabilities that top_logprobs: {c.top_logprobs} "
                "asks for; set top_logprobs: 0, or serve the model with them"
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, message: Message, seed: int) -> bytes:
        c = self._config
        system, turn = split_system(message)
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {
                "type": "image_url",
                "image_url": {"url": data_address(part, c.max_pixels, c.max_image_bytes)}
                | ({} if c.image_detail is None else {"detail": c.image_detail}),
            }
            for part in turn
        ]
        before = [{"role": "system", "content": system}] if system else []
        body: dict[str, Any] = {
            "model": c.model,
            "messages": [*before, {"role": "user", "content": content}],
            "max_tokens": c.max_new_tokens,
            "temperature": c.temperature,
            "top_p": c.top_p,
        }
        if c.send_seed:
            body["seed"] = seed
        if c.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": c.top_logprobs}
        return encode_body(body, c.extra)

    async def _send(self, body: bytes, seconds: float) -> Reply:
        answer = await complete(self._client, self._url, body, seconds)
        return Reply(
            text=answer.text,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_completion_tokens=answer.num_completion_tokens,
            truncated=answer.is_cut_off,
            finish_reason=answer.finish_reason,
            token_probabilities=answer.token_probabilities,
        )
