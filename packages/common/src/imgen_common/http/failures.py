"""How a request fails, and what servers say of it."""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

HttpFailure = Literal["unreachable", "refused", "rate_limited", "server_error", "timeout", "malformed_response"]
"""unreachable: no connection.  refused: the server said no for good.  rate_limited: it said not now.  server_error: it
failed.  timeout: it was too slow.  malformed_response: its answer cannot be read."""
DOWN_STATUSES = (502, 503, 504, 529, *range(520, 524), 530)
"""What a gateway (Cloudflare: 52x, 530) answers while the server behind it is gone or starts, and a server that has too
much to do."""
MAX_ERROR_BYTES = 1000
"""Bytes that are shown of an answer which is not JSON."""
FILTERED = re.compile(
    r'\\*"(?:content_?filter|content_policy_violation|moderation_blocked|data_?inspection_?failed|flagged_input|'
    r'\w*SensitiveContentDetected(?:\.\w+)?)\\*"|ContentPolicyViolationError'
    r"|violates (?:our |the )?(?:usage|content|safety) (?:guidelines|polic)|SAFETY_CHECK_TYPE",
    re.IGNORECASE,
)
"""What the filters of OpenAI, Azure, DashScope, OpenRouter, Ark and xAI write into an answer, whatever its status, and
gateways into a JSON text inside it."""
USED_UP = re.compile(
    r"insufficient_quota|exceeded_current_quota|billing_hard_limit|billing_not_active|Arrearage|"
    r"credit balance is too low|account [^.]{0,80}is suspended|spending limit|"
    r"insufficient (?:balance|credits|funds)|key limit exceeded",
    re.IGNORECASE,
)
"""What OpenAI, Moonshot, DashScope, Anthropic, Fireworks and others call a quota or credit that is used up, under the
status of a busy server (429) or of a bad request (400, 412)."""
NO_CREDIT = 402
"""The status that HTTP has for it."""
USED_UP_STATUSES = (400, NO_CREDIT, 403, 412, 429)
"""Those under which makers say it; words under others, as 422, may be those of the request."""
DENIED = (401, NO_CREDIT, 403, 404, 405, 407)
"""Statuses of a service that takes no request: of this key, which may have expired, without credit, at this address."""
RATE_LIMIT = re.compile("rate.?limit|throttl", re.IGNORECASE)
MOMENTARY = re.compile("(overload|unavailable)|server_error|internal_error", re.IGNORECASE)
"""Names of errors that pass; of the first two a server that has too much to do."""
HTTP_ERRORS = frozenset(map(str, range(400, 600)))
ERROR_KEYS = ("error", "errors", "base_resp", "message", "detail", "reason", "status_msg", "error_msg", "msg")
"""Where servers write what went wrong, from the outermost mapping inwards."""
INSTEAD = ("base_resp", "message", "error_msg", "msg")
"""Where they write it in the place of what was asked for."""


class HttpError(Exception):
    """A request that failed.  The message fits on one line and shows no token.

    can_retry: whether the same request may succeed later.  retry_after: seconds that the server asks to wait.
    status, body: of the server's answer, where it gave one.  has_begun: whether a good answer had begun to arrive.
    """

    def __init__(
        self,
        kind: HttpFailure,
        message: str,
        *,
        can_retry: bool = True,
        retry_after: float | None = None,
        status: int | None = None,
        body: bytes = b"",
        has_begun: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.can_retry, self.retry_after, self.status, self.body = kind, can_retry, retry_after, status, body
        self.has_begun = has_begun

    @property
    def is_denied(self) -> bool:
        """Whether it says nothing of the request, which is answered once key, credit or address are."""
        return self.status in DENIED

    @property
    def is_outage(self) -> bool:
        """Whether the service is not there for anybody, so that waiting helps."""
        return self.kind in ("unreachable", "rate_limited") or self.status in DOWN_STATUSES


class ConnectionLost(HttpError):
    """The connection broke once the request was sent, without an answer; the server may have worked on it."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


class Moved(HttpError):
    """A file is at another address."""

    def __init__(self, address: str, message: str) -> None:
        super().__init__("refused", message, can_retry=False)
        self.address = address


class Refusal(HttpError):
    """A model, or the filter of its server, will not answer this one request; the message has its words."""

    def __init__(self, message: str) -> None:
        super().__init__("refused", message, can_retry=False)


def failure_of_status(status: int) -> tuple[HttpFailure, bool]:
    """What an error status means, and whether the request may be sent again."""
    if status in (408, 409, 425, 429):
        return "rate_limited", True
    return ("server_error", True) if status >= 500 else ("refused", False)


def error_in_answer(answer: Any, wanted: str | None = None) -> HttpError | None:
    """The failure that a body reports under status 200, with the server's words, as gateways do; None if it has none.

    wanted: the key of what was asked for; where that is missing or empty, a message in its place is a failure too.
    It counts as its own `code` or `status` says where that is one of HTTP, and as refused otherwise; as a Refusal, if
    it is a filter's.
    """
    if not isinstance(answer, dict):
        return None
    is_good = wanted is not None and bool(answer.get(wanted))
    error = next((answer[name] for name in ("error", "errors") if _says_something(answer.get(name), is_good)), None)
    is_missing = wanted is not None and not is_good and any(answer.get(key) for key in INSTEAD)
    if error is None and (answer.get("object") == "error" or is_missing):
        error = answer
    if error is None:
        return None
    inner = error[0] if isinstance(error, list) else error
    places = [place for place in (inner, answer) if isinstance(place, dict)]
    given = [place.get(key) for place in places for key in ("code", "status")]
    codes = [int(code) for code in given if isinstance(code, int | str) and str(code) in HTTP_ERRORS]
    words, said = _words({"error": error}), _as_json(error)
    if FILTERED.search(said):
        return Refusal(words)
    names = " ".join(map(str, [*given, *(place.get("type") for place in places)]))
    status = codes[0] if codes else _status_of_names(words, names)
    status = NO_CREDIT if status in (None, *USED_UP_STATUSES) and USED_UP.search(said) else status
    kind, can_retry = failure_of_status(status) if status else ("refused", False)
    return HttpError(kind, words, can_retry=can_retry, status=status)


def _status_of_names(words: str, names: str) -> int | None:
    """The status that an error without one means, by its words and the names of its code and type, if they say."""
    if RATE_LIMIT.search(f"{words} {names}"):
        return 429
    passing = MOMENTARY.search(names)
    return None if passing is None else 503 if passing[1] else 500


def _says_something(error: Any, is_good: bool) -> bool:
    """Whether it is an error; gateways send an object without any words and, with good answers, one of code 0."""
    if not isinstance(error, dict):
        return bool(error)
    return any(error.values()) and not (is_good and error.get("code") in (0, "0"))


TITLE = re.compile(r"<title>([^<]+)</title>", re.IGNORECASE)
"""Where the page of a proxy says what is wrong."""


def error_message(data: bytes) -> str:
    """What the body of an error says, as servers write it: {"error": {"message": ...}}, {"detail": ...}, or text."""
    try:
        return _words(json.loads(data))[:MAX_ERROR_BYTES]
    except (ValueError, RecursionError):
        text = data[:MAX_ERROR_BYTES].decode("utf-8", "replace")
        title = TITLE.search(text) if text.lstrip()[:1] == "<" else None
        return title[1] if title else text


def _words(said: Any) -> str:
    """The words inside an error, or the whole of it where no place for words is known."""
    whole = said
    for name in ERROR_KEYS:
        if (located := _located(said)) is not None:
            return located
        if (behind := _said_behind(said)) is not None:
            return behind
        said = said[0] if isinstance(said, list) and len(said) == 1 else said
        said = said[name] if isinstance(said, dict) and said.get(name) else said
    return said if isinstance(said, str) else _as_json(whole)[:MAX_ERROR_BYTES] or "an error without words"


def _as_json(value: Any) -> str:
    """The value as JSON; empty where it is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""


def _said_behind(said: Any) -> str | None:
    """The words of a gateway (OpenRouter) with those of the server behind it; None for others."""
    metadata = said.get("metadata") if isinstance(said, dict) else None
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if not raw:
        return None
    behind = error_message(raw.encode("utf-8", "replace")) if isinstance(raw, str) else _words(raw)
    return ": ".join(filter(None, (said["message"] if isinstance(said.get("message"), str) else "", behind)))


def _located(said: Any) -> str | None:
    """What FastAPI's servers say of the keys of a request, each with its key; None for anything else."""
    if not (isinstance(said, list) and said and all(isinstance(one, dict) for one in said)):
        return None
    if not all(isinstance(one.get("loc"), list) and isinstance(one.get("msg"), str) for one in said):
        return None
    places = (".".join(str(part) for part in one["loc"] if part != "body") for one in said)
    return "; ".join(f"{place}: {one['msg']}" for place, one in zip(places, said, strict=True))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, as a number or a date, if it does."""
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked) if len(asked) < 10 else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
