"""The HTTP client: requests to one service, its token, bounded answers, and errors in words."""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from imgen_common.errors import UserError, one_line
from imgen_common.http.addresses import (
    CONNECT_SECONDS,
    CREDENTIALS,
    certificates,
    check_proxy,
    proxy_of,
    redacted,
    version_hint,
)
from imgen_common.http.failures import (
    FILTERED,
    NO_CREDIT,
    USED_UP,
    USED_UP_STATUSES,
    ConnectionLost,
    HttpError,
    Moved,
    Refusal,
    error_message,
    failure_of_status,
    retry_after,
)
from imgen_common.http.retry import RetryingCaller, RetryPolicy

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
MAX_REDIRECTS = 5
"""Of a file, one after the other."""
MIN_SECRET, LONGEST_WORD = 6, 16
"""Characters of the shortest token that is taken out of answers, and of one of letters alone; another may be a
placeholder or an ordinary word, such as EMPTY or secret."""

AUTHORITY = "set SSL_CERT_FILE to a file with the certificate of its authority"
CERTIFICATE_REMEDIES = {
    "expired": "it must be renewed, unless the clock of this machine is wrong",
    "not yet valid": "check the clock of this machine",
    "ismatch": "give the server's address under a name that its certificate has",
}
"""What to do about a certificate, by OpenSSL's words; `AUTHORITY` about others."""
OTHER_PROXY = "correct the proxy, or name the host in NO_PROXY"


class HttpClient(RetryingCaller):
    """Requests to one service, under a RetryPolicy: `call` sends one, made by `request`, until it is answered.

    The bearer token is read once from the environment.  It follows no redirect, and no message shows it, not even where
    the server repeats it; `download` sends none, and follows.
    """

    def __init__(
        self,
        name: str,
        token_env: str,
        policy: RetryPolicy,
        concurrency: int = 16,
        max_bytes: int = 8 * 2**20,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        """token_env: variable of the environment with the token; no token is sent where it is not set.  max_bytes: of
        one answer.  transport: for tests.  Raises UserError, without the token, for one that no header can carry.
        """
        super().__init__(policy, concurrency, name)
        self._token_env, self._token = token_env, token_of(token_env)
        if not (self._token.isascii() and self._token.isprintable()):
            raise UserError(
                f"{token_env}: holds characters that no token has, such as ends of lines or accents; set it again"
            )
        self._concurrency, self._max_bytes, self._transport = concurrency, max_bytes, transport
        # as it may stand in an answer: plain, in an address, in JSON
        spellings = {self._token, quote(self._token, safe=""), json.dumps(self._token)[1:-1]} - {""}
        self._spellings = sorted(spellings, key=len, reverse=True)
        self._is_random = len(self._token) >= (LONGEST_WORD if self._token.isalpha() else MIN_SECRET)
        self._clients: dict[tuple[str | None, bool], httpx.AsyncClient] = {}

    async def request(
        self, method: str, base: str, path: str = "", *, seconds: float, with_token: bool = True, **content: Any
    ) -> bytes:
        """The body of a good answer to one request, without retries and without the token, should the server repeat it.

        with_token: False for an address that the service answered, of which nobody can correct anything.  content: as
        httpx takes it.  Raises HttpError, whose messages begin with `base`, and UserError where proxies or
        certificates of the environment cannot be used.
        """
        import ssl

        import httpx

        headers = dict(content.pop("headers", {}))
        if with_token and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        # a silent address must not use up all the time that is left
        limits = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        proxy = proxy_of(base) if self._transport is None else None
        client = self._opened(proxy, is_secure=base.startswith("https:") or (proxy or "").startswith("https:"))
        through = f" through the proxy {redacted(proxy)}" if proxy else ""
        answer: httpx.Response | None = None
        try:
            async with client.stream(method, base + path, headers=headers, timeout=limits, **content) as answer:
                data = await self._read(answer, base)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise HttpError("timeout", f"{base}{through}: no answer within {seconds:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, ssl.SSLError, ConnectionError) as error:
            has_begun = answer is not None and answer.is_success
            raise self._failure(base + through, error, proxy, has_begun=has_begun) from None
        if with_token:
            data = self._without_token(data)
        if answer.status_code >= 300:
            remedy = self._remedy(answer, base + path) if with_token else self._remedy_of_file(base + through, answer)
            if proxy and base.startswith("http:"):
                remedy += self._remedy_of_proxy(base + through, answer, data)
            raise self._status_error(base + through, answer, data, remedy)
        return data

    async def download(self, address: str, seconds: float, num_redirects: int = MAX_REDIRECTS) -> bytes:
        """The file at an address that the service answered, or at one to which that points; without the token.

        What follows `?` in an address is often a signature that opens it, so that no message has it.  Raises HttpError.
        """
        place, mark, query = address.partition("?")
        try:
            return await self.request("GET", place, mark + query, seconds=seconds, with_token=False)
        except Moved as moved:
            if not num_redirects:
                raise
            return await self.download(moved.address, seconds, num_redirects - 1)

    def malformed(self, base: str, reason: str) -> HttpError:
        """The error of an answer that cannot be read; the request may be sent again."""
        return HttpError("malformed_response", f"{base}: {self.clean(reason)}")

    def named(self, base: str, error: HttpError, remedy: str = "") -> HttpError:
        """The same failure, its message in one line that begins with the address and ends with the remedy."""
        if "Unexpected endpoint" in str(error):  # LM Studio, under status 200
            remedy = remedy or version_hint(base)
        message = f"{base}: {self.clean(str(error))}{remedy}"
        if isinstance(error, Refusal):
            return Refusal(message)
        return HttpError(error.kind, message, can_retry=error.can_retry, status=error.status)

    def clean(self, text: str) -> str:
        """Words of the server on one line, cut short, without the token."""
        return one_line(self._hidden(text))

    def without_token(self, text: str) -> str:
        """An answer without the token, also in the escapes of JSON, unless that may be an ordinary word."""
        return self._hidden(text) if self._is_random else text

    def _hidden(self, text: str) -> str:
        for spelling in self._spellings:
            text = text.replace(spelling, "...")
        return text

    async def close(self) -> None:
        """Close the connections; the client can be used again."""
        self.join_loop()
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.aclose()

    def join_loop(self) -> bool:
        """As of a caller; connections of another event loop cannot be used, nor closed, once it has ended."""
        if is_other := super().join_loop():
            self._clients = {}
        return is_other

    def _opened(self, proxy: str | None, is_secure: bool) -> "httpx.AsyncClient":
        """The client of a proxy, or of none.  What the environment says was read before: httpx need not."""
        self.join_loop()
        if (proxy, is_secure) not in self._clients:
            import ssl

            import httpx

            if proxy:
                check_proxy(proxy)
            # without TLS, certificates need not be there: that context trusts no server
            is_checked = is_secure and self._transport is None
            verify = certificates() if is_checked else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._clients[proxy, is_secure] = httpx.AsyncClient(
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency),
                transport=self._transport,
                follow_redirects=False,
                proxy=proxy,
                verify=verify,
                trust_env=False,
            )
        return self._clients[proxy, is_secure]

    def _without_token(self, data: bytes) -> bytes:
        for spelling in self._spellings if self._is_random else ():
            data = data.replace(spelling.encode(), b"...")
        return data

    def _failure(self, place: str, error: Exception, proxy: str | None, *, has_begun: bool) -> HttpError:
        """What an error of the connection means; has_begun: while a good answer was read."""
        import httpx

        reason = self.clean(str(error))
        if isinstance(error, httpx.DecodingError):
            what = f"an answer that cannot be decompressed ({reason})"
        elif has_begun:
            what = f"its answer was cut short ({reason})"
        elif isinstance(error, UnicodeEncodeError):
            return HttpError("refused", f"{place}: the request cannot be written ({reason})", can_retry=False)
        else:
            return self._unreachable(place, error, proxy)
        return HttpError("malformed_response", f"{place}: {what}", has_begun=has_begun)

    def _unreachable(self, place: str, error: Exception, proxy: str | None) -> HttpError:
        import httpx

        reason, what = self.clean(CREDENTIALS.sub("//...@", str(error))) or type(error).__name__, ""
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            what = "its certificate cannot be verified"
            remedy = next((words for sign, words in CERTIFICATE_REMEDIES.items() if sign in reason), AUTHORITY)
        elif "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
            what = "refuses the TLS connection"
            remedy = "if it asks for a certificate of its clients, reach it through a proxy that has one"
        elif "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
            what, remedy = "it does not speak TLS", "give its address with http:// instead of https://"
            if (proxy or "").startswith("https:"):
                what, remedy = "the proxy does not speak TLS", "give the proxy's address with http://, also for https"
        if what:
            return HttpError("unreachable", f"{place}: {what} ({reason}); {remedy}", can_retry=False)
        message = f"{place}: cannot be reached ({reason}){f'; {OTHER_PROXY}' if proxy else ''}"
        if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):
            return ConnectionLost(message)
        return HttpError("unreachable", message)

    async def _read(self, answer: "httpx.Response", base: str) -> bytes:
        data = bytearray()
        async for piece in answer.aiter_bytes():
            data += piece
            if len(data) > self._max_bytes:
                what = f"{base}: an answer of more than {self._max_bytes} bytes"
                raise HttpError("malformed_response", what, can_retry=False)
        return bytes(data)

    def _status_error(self, place: str, answer: "httpx.Response", data: bytes, remedy: str) -> HttpError:
        status, text = answer.status_code, data.decode("utf-8", "replace")
        kind, can_retry = failure_of_status(status)
        if status == 407:
            remedy = "; give the proxy's name and password in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
        if status == 413:
            remedy = "; send smaller images, or raise the server's limit (nginx: client_max_body_size)"
        if FILTERED.search(text):  # one request: the server is there, and its key is right
            return Refusal(f"{place}: status {status}: {self.clean(error_message(data))}")
        message = f"{place}: status {status}: {self.clean(error_message(data))}{remedy}"
        # waiting brings none back, and no other request is answered
        if status in USED_UP_STATUSES and USED_UP.search(text):
            kind, can_retry, status = "refused", False, NO_CREDIT
        wait = retry_after(answer.headers)
        return HttpError(kind, message, can_retry=can_retry, retry_after=wait, status=status, body=data)

    def _remedy_of_proxy(self, place: str, answer: "httpx.Response", data: bytes) -> str:
        """What to do where a page may be that of the proxy.  Raises HttpError where it is for sure."""
        if "x-squid-error" in answer.headers and answer.status_code != 407:
            said = self.clean(error_message(data))
            raise HttpError("unreachable", f"{place}: the proxy cannot reach it ({said}); {OTHER_PROXY}")
        return f"; if the proxy itself says so: {OTHER_PROXY}" if data.lstrip()[:1] == b"<" else ""

    def _remedy_of_file(self, place: str, answer: "httpx.Response") -> str:
        """Nothing.  Raises Moved for a file that is at another address, with TLS."""
        following = answer.next_request
        if following is not None and following.url.scheme == "https":
            raise Moved(str(following.url), f"{place}: is moved on more than {MAX_REDIRECTS} times")
        return ""

    def _remedy(self, answer: "httpx.Response", url: str) -> str:
        status = answer.status_code
        if status < 400:
            target = redacted(self.clean(answer.headers.get("location", "nowhere")))
            return f"; it points to {target}: give that address as url"
        if status in (401, 403):
            return f"; {'' if status == 401 else 'if it asks for a key, '}set {self._token_env} to a valid key"
        return version_hint(url) if status in (404, 405) else ""


def token_of(variable: str) -> str:
    """The token in a variable of the environment, without quotation marks around it, which `docker --env-file` leaves,
    and the scheme that may stand before it; empty: there is none."""
    given = re.sub(r"""^(["'])(.*)\1$""", r"\2", os.environ.get(variable, "").strip())
    return re.sub("^bearer +", "", given, flags=re.IGNORECASE)


def run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, for code that is not asynchronous but may be called where an event loop runs.

    Ctrl-C, or a notebook's stop button, cancels it.
    """
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def main() -> T:
        task = asyncio.ensure_future(work)
        running.append((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(asyncio.run, main()).result()
        except KeyboardInterrupt:
            with contextlib.suppress(RuntimeError):  # it has just ended
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
            raise
