"""Who may look at the dashboard, and who may start and stop runs with it.

The dashboard starts programs as the person who runs it. So it listens on a loopback address unless it has an
access token, and it refuses requests from pages of other sites that the same browser has open.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

from harness.errors import ConfigError

__all__ = ["Access", "Gate", "is_loopback"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Refusal = tuple[int, str, list[tuple[bytes, bytes]]]
"""Status, text and headers of an answer."""
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
        "frame-ancestors 'self'",  # TensorBoard shows some of its plugins in frames
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
    """Where the dashboard listens, the token that it asks for, and whether it starts and stops runs.

    Raises:
        ConfigError: an address that others can reach without a token, or a token too short.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    may_control: bool | None = None
    """None: only when it listens to this machine alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port is {self.port}", rule="it has to be in 0 to 65535; 0 picks a free one")
        if self.token is not None and len(self.token) < 8:
            raise ConfigError("the token is shorter than 8 characters", remedy="choose a longer one")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host is {self.host!r} and there is no token",
                rule="an address that other machines can reach is served only to those who know a token",
                remedy="add --token auto",
            )

    @property
    def controls(self) -> bool:
        """Whether runs may be started and stopped from the page."""
        return is_loopback(self.host) if self.may_control is None else self.may_control


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

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Status, text and headers of the answer to a request that goes no further; None lets it pass."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if is_loopback(self._access.host) and not is_loopback(_split(f"//{host}").hostname or ""):
            # A name that another site made point here (DNS rebinding).
            return 403, f"this dashboard answers to localhost, not to {_shown(host)}", []
        origin = headers.get("origin")
        if origin is not None and (not host or _split(origin).netloc != host):
            return 403, "a page of another site asked for this", []
        if any(part in scope["path"] for part in CLOSED):
            return 404, "there is no such page", []
        return None if self._access.token is None else self._login(scope, headers, self._access.token)

    def _login(self, scope: Scope, headers: dict[str, str], token: str) -> Refusal | None:
        if self._knows_token(headers, token):
            return None
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if _same(query.pop("token", [""])[0], token):
            rest = urlencode(query, doseq=True)
            address = "".join(c for c in scope["path"] if c.isprintable()) or "/"
            cookie = f"{self._cookie_name}={self._session}; Path=/; HttpOnly; SameSite=Strict"
            location = "/" + address.lstrip("/\\") + (f"?{rest}" if rest else "")
            return 303, "", [(b"set-cookie", cookie.encode()), (b"location", location.encode())]
        return 401, "open the address that `harness dashboard` printed, the one with ?token= in it", []

    @property
    def _cookie_name(self) -> str:
        return f"harness-dashboard-{self._access.port}"  # a cookie is sent to all ports of a host

    def _knows_token(self, headers: dict[str, str], token: str) -> bool:
        """Whether a cookie says that the token was given before, or the request carries it as a bearer."""
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(headers.get("cookie", ""))
        except Exception:  # noqa: BLE001  (a cookie that cannot be read is none)
            cookie.clear()
        morsel = cookie.get(self._cookie_name)
        kind, _, given = headers.get("authorization", "").partition(" ")
        has_session = morsel is not None and _same(morsel.value, self._session)
        return has_session or (kind.lower() == "bearer" and _same(given.strip(), token))


def _same(given: str, secret: str) -> bool:
    """Compares in constant time, so that how long it takes gives nothing away."""
    return hmac.compare_digest(given.encode(), secret.encode())


def _split(address: str) -> SplitResult:
    """Its parts; all of them are empty where it is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


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
