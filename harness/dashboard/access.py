"""Who may look at the dashboard, and who may start and stop runs with it.

The dashboard starts programs as the person who runs it. So it listens to this machine alone unless it is
given a secret, and it never takes an order from a page of another site that the same browser has open.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from harness.errors import ConfigError

__all__ = ["Access", "Gate", "is_loopback"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Gradio's own ways of taking and handing out files and of fetching addresses; the page needs none of them.
CLOSED = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/gradio_api/deep_link", "/proxy=")

POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's templates are compiled in the page
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'none'",
        "form-action 'self'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where the dashboard listens, the secret that it asks for, and whether it starts and stops runs.

    Raises:
        ConfigError: another address than this machine's own without a secret, or a secret too short.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    user: str | None = None
    password: str | None = None
    may_control: bool | None = None
    """None: only when it listens to this machine alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}", rule="it lies in 0 to 65535; 0 takes a free one")
        if (self.user is None) != (self.password is None):
            raise ConfigError("one of user and password is missing", remedy="give both, or a token")
        secret = self.token if self.token is not None else self.password
        if secret is not None and len(secret) < 8:
            raise ConfigError(
                "the token or password is shorter than 8 characters", remedy="take a longer one"
            )
        if secret is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host is {self.host!r} and there is no secret",
                rule="another address than this machine's own is served only to those who know one",
                remedy="add --token auto, or --user and a password in HARNESS_DASHBOARD_PASSWORD",
            )

    @property
    def controls(self) -> bool:
        """Whether runs may be started and stopped from the page."""
        return is_loopback(self.host) if self.may_control is None else self.may_control

    @property
    def is_open(self) -> bool:
        """Whether no secret is asked for."""
        return self.token is None and self.password is None


def is_loopback(host: str) -> bool:
    """Whether an address or name (`localhost`) can be reached from this machine alone."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class Gate:
    """Wraps the whole application: every request and socket passes here before anything else sees it."""

    def __init__(self, app: App, access: Access) -> None:
        self._app = app
        self._access = access
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(scope, receive, send, *refusal)
            return
        await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Status, text and headers of the answer to a request that goes no further; None lets it pass."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if is_loopback(self._access.host) and not is_loopback(_hostname(f"//{host}")):
            # A name that another site made point here (DNS rebinding).
            return 403, f"this dashboard answers to localhost, not to {_shown(host)}", []
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "a page of another site asked for this", []
        if any(part in scope["path"] for part in CLOSED):
            return 404, "there is no such page", []
        return None if self._access.is_open else self._login(scope, headers)

    def _login(
        self, scope: Scope, headers: dict[str, str]
    ) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        if self._knows_secret(headers):
            return None
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        token = self._access.token
        if token is not None and _same(query.pop("token", [""])[0], token):
            rest = urlencode(query, doseq=True)
            address = "".join(c for c in scope["path"] if c.isprintable()) or "/"
            cookie = f"{self._cookie_name}={self._session}; Path=/; HttpOnly; SameSite=Strict"
            location = "/" + address.lstrip("/\\") + (f"?{rest}" if rest else "")
            return 303, "", [(b"set-cookie", cookie.encode()), (b"location", location.encode())]
        if self._access.password is not None:
            return 401, "a user and a password are needed", [(b"www-authenticate", b'Basic realm="harness"')]
        return 401, "open the address that `harness dashboard` printed, the one with ?token= in it", []

    @property
    def _cookie_name(self) -> str:
        return f"harness-dashboard-{self._access.port}"  # cookies do not tell ports apart

    def _knows_secret(self, headers: dict[str, str]) -> bool:
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(headers.get("cookie", ""))
        except Exception:  # noqa: BLE001  (a cookie that cannot be read is none)
            cookie.clear()
        morsel = cookie.get(self._cookie_name)
        if morsel is not None and _same(morsel.value, self._session):
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._access.token is not None:
            return _same(given.strip(), self._access.token)
        if kind.lower() == "basic" and self._access.password is not None:
            return _same(_decoded(given), f"{self._access.user}:{self._access.password}")
        return False


def _same(given: str, secret: str) -> bool:
    """In a time that tells nothing about how much of it was right."""
    return hmac.compare_digest(given.encode(), secret.encode())


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _shown(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:80]


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sending


async def _answer(
    scope: Scope, receive: Receive, send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]]
) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    plain = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *plain]})
    await send({"type": "http.response.body", "body": text.encode()})
