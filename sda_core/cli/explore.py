"""``sda explore``: serve a page to explore a finished run in a browser on this machine."""

from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sda_core.cli.stage import Root, one_line_errors

HOST = "127.0.0.1"
_PAGE = Path(__file__).resolve().parents[1] / "explore" / "page.py"
_SETTINGS = {
    "server.address": HOST,  # other machines cannot open the page
    "server.headless": "true",  # do not open a browser or ask for an e-mail address
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "viewer",  # no button to publish the page
    "logger.hideWelcomeMessage": "true",
    "runner.magicEnabled": "false",
}


def command(root: Path, port: int) -> list[str]:
    """The command that serves the page: Streamlit with settings that override any configuration file of the user."""
    settings = [f"--{name}={value}" for name, value in (_SETTINGS | {"server.port": str(port)}).items()]
    return [sys.executable, "-m", "streamlit", "run", str(_PAGE), *settings, "--", str(root.resolve())]


def explore(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port on this machine.")] = 8501,
    root: Root = Path(),
) -> None:
    """Explore a finished run in a browser: nearest items and recommendations, variants side by side.

    Type a text, pick an item, or build a history. The page is at 127.0.0.1, so other machines cannot open it; it makes no
    request to other machines. Needs the extra explore.
    """
    from sda_core.errors import ConfigError
    from sda_core.explore.finished_run import FinishedRun

    with one_line_errors("explore", root):
        if find_spec("streamlit") is None:
            advice = 'run `pip install -c constraints.txt -e ".[cpu,explore]"`, or `pip install "sda-rec[cpu,explore]"`'
            raise ConfigError("explore", "needs the package streamlit, which is not installed", advice)
        FinishedRun(root).variants()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                raise ConfigError("--port", f"{port} is in use or not allowed", "name another one, for example 8502") from None
        typer.echo(f"http://{HOST}:{port} shows the page; press Ctrl-C to stop")
        sys.stdout.flush()
        words = command(root, port)
        os.execv(words[0], words)  # noqa: S606 (no shell, and nothing of it is the user's but a path and a port)
