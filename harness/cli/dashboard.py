"""`harness dashboard`: every run in a browser."""

from __future__ import annotations

import importlib.util
import secrets
import webbrowser
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from harness import env
from harness.cli.arguments import parser
from harness.cli.errors import reporting
from harness.errors import ConfigError

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Serves the dashboard until Ctrl-C."""
    options = _options(argv)
    with reporting() as outcome:
        if importlib.util.find_spec("gradio") is None:
            raise ConfigError("Gradio is not installed", remedy="pip install 'stability-harness[dashboard]'")
        from harness.dashboard.access import Access
        from harness.dashboard.server import serve

        access = Access(
            host=options.host,
            port=options.port,
            token=secrets.token_urlsafe(24) if options.token == "auto" else options.token,
            may_control=options.control,
        )
        serve(options.runs, access, started=lambda address: _announce(address, access.controls, options))
    return outcome.exit_code


def _options(argv: Sequence[str]) -> Namespace:
    arguments = parser(
        "dashboard",
        "Show every run in a browser, live, finished or crashed; compare, start and stop runs. It reads "
        "the logs and does not slow a run down.",
    )
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    arguments.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, which only this machine can reach)",
    )
    arguments.add_argument("--port", type=int, default=7860, help="default: 7860; 0 picks a free one")
    arguments.add_argument(
        "--token",
        default=env.dashboard_token(),
        help="required to open the page; `auto` makes one and prints it in the address "
        "(default: HARNESS_DASHBOARD_TOKEN, if it is set)",
    )
    control = arguments.add_mutually_exclusive_group()
    control.add_argument(
        "--control",
        action="store_true",
        default=None,
        help="the page can start and stop runs (default: only if other machines cannot reach it)",
    )
    control.add_argument("--no-control", dest="control", action="store_false", help="the page is read-only")
    arguments.add_argument("--open", action="store_true", help="open it in this machine's browser")
    return arguments.parse_args(argv)


def _announce(address: str, controls: bool, options: Namespace) -> None:
    mode = "can start and stop runs" if controls else "read-only"
    print(f"dashboard of {options.runs} at {address} ({mode}); Ctrl-C ends it, runs keep going", flush=True)
    if options.open:
        webbrowser.open(address)
