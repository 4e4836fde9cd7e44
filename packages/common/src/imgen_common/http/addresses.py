"""Addresses of services, and how they are reached: proxies and certificates, as the environment names them."""

import importlib.util
import ipaddress
import os
import re
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from imgen_common.config.secrets import SECRET_VALUE
from imgen_common.errors import UserError, one_line

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS = 5.0
"""Longest time for a connection, so that an address where nobody answers does not use up the whole time limit."""
CREDENTIALS = re.compile(r"//\S*@")
"""Name and password in an address that stands among other words."""
METHODS = ("completions", "generations", "edits", "models", "generate")
"""How an address ends that was copied with the method behind it."""
VERSION = re.compile(r"/v\d")


def check_url(url: str) -> str:
    """`url` without a slash at its end.  Raises UserError, which shows no secret, unless it is a plain http address."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and not any(mark in url for mark in "?#")  # `port` raises for what is no number
        plain = plain and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        parts, plain = None, False
    if not plain or parts is None or "@" in parts.netloc or url != one_line(url, None) or " " in url:
        raise UserError(
            f"url {redacted(url)!r}: must be like http://HOST:PORT/v1, without name, password, key or query in it; "
            "keys belong into the environment"
        )
    if any(map(SECRET_VALUE.match, parts.path.split("/"))):
        raise UserError("url: a part of its path is a key; keys belong into the environment, not into an address")
    base, _, method = url.rstrip("/").rpartition("/")
    if method in METHODS:
        base = base.removesuffix("/chat").removesuffix("/images")
        raise UserError(f"url {redacted(url)!r}: names one method of the server; give the address before it: {base}")
    return url.rstrip("/")


def _checked(url: str) -> str:
    check_url(url)
    return url


ServiceUrl = Annotated[str, AfterValidator(_checked)]
"""An address in a configuration, as it was given; one that `check_url` refuses is refused before it is written."""


def redacted(url: str) -> str:
    """An address for messages, on one line and without what may be secret: name, password, query, fragment."""
    _, at, host = url.rpartition("@")
    return one_line(re.split("[?#]", f"...@{host}" if at else url)[0])


def version_hint(url: str) -> str:
    """What to try where an address without a version does not know a path; empty for others."""
    path = urlsplit(url).path
    if VERSION.search(path):
        return ""
    ollama = ", Ollama's with /v1 in the place of /api" if path.startswith("/api/") else ""
    return f"; if the address lacks its version, give it with /v1 at its end{ollama}"


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY), if any.

    This machine itself is never asked through a proxy, and neither is what NO_PROXY names.
    """
    parts = urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_loopback(host) or urllib.request.proxy_bypass(parts.netloc):
        return None
    if _is_listed(host, proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_listed(host: str, listed: str) -> bool:
    """Whether NO_PROXY names a host in a form that Go's and Node's programs read, and Python does not: *.DOMAIN, and a
    network such as 10.0.0.0/8."""
    entries = [entry.strip().lower() for entry in listed.split(",")]
    if any(entry.startswith("*.") and host.endswith(entry[1:]) for entry in entries):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        for entry in entries:
            with suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                    return True
    return False


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, also as servers print that they listen everywhere: 0.0.0.0."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_proxy(proxy: str) -> None:
    """Raises UserError for a proxy that cannot be used."""
    shown = redacted(proxy)
    try:
        parts = urlsplit(proxy)
        is_whole = bool(parts.hostname) and parts.port != 0  # a port that is no number, or too large, raises ValueError
    except ValueError:
        is_whole = False
    if not is_whole or parts.scheme not in ("http", "https", "socks5", "socks5h"):
        raise UserError(
            f"the proxy {shown} of the environment: must be http, https or socks5 with a host, and a port up to 65535; "
            "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the service in NO_PROXY"
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise UserError(
            f"the proxy {shown} of the environment needs the package socksio: pip install socksio, unset ALL_PROXY, or "
            "name the service in NO_PROXY"
        )


TLS_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
"""What Python's TLS reads: the authorities that servers are checked with, and a file for the keys of connections."""


def certificates() -> "ssl.SSLContext":
    """What servers are checked with: SSL_CERT_FILE and SSL_CERT_DIR, else the usual authorities.

    Raises UserError where one of them cannot be read, or the file of SSLKEYLOGFILE cannot be written.
    """
    import httpx

    for name, divider in (("SSL_CERT_FILE", None), ("SSL_CERT_DIR", os.pathsep)):
        if (path := os.environ.get(name)) and not any(map(os.path.exists, path.split(divider) if divider else [path])):
            raise UserError(f"{name}={path}: is not there; correct it or unset it")
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        given = {name: path for name in TLS_VARIABLES if (path := os.environ.get(name))}
        names = " or ".join([name for name, path in given.items() if path == error.filename] or given)
        reason = one_line(str(error))
        raise UserError(f"{names or 'the certificates'}: cannot be used ({reason}); correct or unset it") from None
