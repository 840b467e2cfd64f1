"""Who gets through the dashboard's gate. A small application stands behind it in place of the page."""

from collections.abc import Iterator

import pytest

from harness.errors import ConfigError

pytest.importorskip("fastapi", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from harness.dashboard.access import Access, Gate, is_loopback

TOKEN = "correct horse battery"
BROKEN = ["http://[", "http://]", "http://[::1", "http://[x]", "http://[v1.1]"]
"""No addresses, for which `urlsplit` raises an error, of some versions of Python."""


async def hello(request: object) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def client(access: Access, base: str = "http://localhost:7860") -> TestClient:
    routes = [
        Route("/{path:path}", hello, methods=["GET", "POST"]),
        WebSocketRoute("/socket", socket),
    ]
    return TestClient(Gate(Starlette(routes=routes), access), base_url=base, follow_redirects=False)


@pytest.fixture
def local() -> Iterator[TestClient]:
    with client(Access()) as one:
        yield one


@pytest.fixture
def guarded() -> Iterator[TestClient]:
    with client(Access(host="0.0.0.0", token=TOKEN), "http://trainer.example:7860") as one:
        yield one


def test_this_machine_needs_no_token_and_may_control(local: TestClient) -> None:
    assert local.get("/").text == "hello"
    assert Access().controls


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]", "a.localhost"])
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "localhost.evil.com", "evil.com", ""])
def test_names_of_other_machines(host: str) -> None:
    assert not is_loopback(host)


def test_a_foreign_name_that_points_here_is_refused(local: TestClient) -> None:
    answer = local.get("/", headers={"host": "evil.com:7860"})
    assert answer.status_code == 403
    assert "localhost" in answer.text


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "http://localhost:9999", "null", "https://", "", *BROKEN]
)
def test_a_page_of_another_site_is_refused(local: TestClient, guarded: TestClient, origin: str) -> None:
    for host in ("localhost:7860", ""):
        headers = {"origin": origin, "host": host, "authorization": f"Bearer {TOKEN}"}
        assert local.post("/gradio_api/queue/join", headers=headers).status_code == 403
        assert guarded.post("/gradio_api/queue/join", headers=headers).status_code == 403


@pytest.mark.parametrize("address", BROKEN)
def test_a_host_that_is_no_address_is_refused(local: TestClient, address: str) -> None:
    assert local.get("/", headers={"host": address.removeprefix("http://")}).status_code == 403


def test_the_own_page_is_not_refused(local: TestClient) -> None:
    assert local.post("/x", headers={"origin": "http://localhost:7860"}).status_code == 200


def test_sockets_of_another_site_are_refused(local: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect),
        local.websocket_connect("/socket", headers={"origin": "http://e.vil"}),
    ):
        pass


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://e.vil/", "/proxy=x"],
)
def test_gradios_ways_to_files_are_closed(local: TestClient, path: str) -> None:
    assert local.get(path).status_code == 404


def test_nothing_may_be_loaded_from_elsewhere(local: TestClient) -> None:
    policy = local.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_the_token_opens_once_and_the_cookie_from_then_on(guarded: TestClient) -> None:
    assert guarded.get("/").status_code == 401
    assert guarded.get("/?token=wrong").status_code == 401
    first = guarded.get("/", params={"token": TOKEN, "run": "a"})
    assert (first.status_code, first.headers["location"]) == (303, "/?run=a")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert guarded.get("/").text == "hello"


def test_the_redirection_stays_here(guarded: TestClient) -> None:
    location = guarded.get("//evil.com/x", params={"token": TOKEN}).headers["location"]
    assert location.startswith("/")
    assert not location.startswith("//")


def test_a_bearer_token_opens(guarded: TestClient) -> None:
    assert guarded.get("/", headers={"authorization": f"Bearer {TOKEN}"}).text == "hello"
    assert guarded.get("/", headers={"authorization": "Bearer no"}).status_code == 401


def test_sockets_need_the_token_too(guarded: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("/socket"):
        pass


def test_another_address_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="no token"):
        Access(host="0.0.0.0")


def test_a_short_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 characters"):
        Access(token="abc")


def test_others_only_look_unless_it_is_allowed() -> None:
    assert not Access(host="0.0.0.0", token=TOKEN).controls
    assert Access(host="0.0.0.0", token=TOKEN, may_control=True).controls
    assert not Access(may_control=False).controls
