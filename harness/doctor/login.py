"""Whether Weights & Biases would take a run from here."""

from __future__ import annotations

import netrc
import socket
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from harness import env
from harness.doctor.finding import Finding, Probe, Site

__all__ = ["WANDB"]

_TIMEOUT_S = 3.0


class _Login(NamedTuple):
    host: str
    has_key: bool
    answers: bool


def _measure(site: Site) -> _Login | None:
    """On rank 0, which is the one that sends."""
    if not site.world.is_main:
        return None
    address = urlsplit(env.wandb_address())
    host = address.hostname or ""
    has_key = env.has_wandb_key() or _is_in_netrc(host)
    return _Login(host, has_key, has_key and _answers(host, address.port or 443))


def _is_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _judge(measured: Sequence[_Login | None]) -> list[Finding]:
    login = measured[0]
    assert login is not None
    if not login.has_key:
        remedy = "`wandb login`, or WANDB_API_KEY; not needed with --tracking.wandb off or offline"
        return [Finding("W&B login", f"no key for {login.host}", "warn", remedy)]
    if not login.answers:
        remedy = "use --tracking.wandb offline here, and `harness sync` where there is a connection"
        return [Finding("W&B login", f"there is a key, and {login.host} does not answer", "warn", remedy)]
    return [Finding("W&B login", f"there is a key, and {login.host} answers")]


WANDB = Probe("W&B login", _measure, _judge)
