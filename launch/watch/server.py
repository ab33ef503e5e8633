"""Serve the page and the state of runs to this machine's browsers, and to nothing else."""

from __future__ import annotations

import errno
import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launch.watch.watched import Watched
from pretrain.common.errors import UserError
from pretrain.common.files import finite_or_null

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")  # by which a browser may call it: not those of other sites
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
}


def page(state: dict[str, Any] | None = None) -> str:
    """Return the page: one that asks for the state, or that holds ``state`` and asks nobody."""
    folder = Path(__file__).parent
    html = (folder / "page.html").read_text()
    parts = {
        "/*style*/": (folder / "page.css").read_text(),
        "/*charts*/": (folder / "charts.js").read_text(),
        "/*page*/": (folder / "page.js").read_text(),
        # A name in it may be "</script>".
        "/*state*/": json_of(state).replace("<", "\\u003c"),
    }
    for mark, text in parts.items():
        html = html.replace(mark, text)
    return html


def json_of(state: dict[str, Any] | None) -> str:
    """Return a state as JSON, which has no NaN."""
    return json.dumps(finite_or_null(state), allow_nan=False)


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        """Answer with the page, or with what has changed since the version that is asked about."""
        host = urlsplit(f"//{self.headers.get('Host', '')}")
        if host.hostname not in _NAMES:
            self._answer(403, "text/plain", "this server answers to 127.0.0.1 and localhost alone")
            return
        url = urlsplit(self.path)
        if url.path == "/":
            self._answer(200, "text/html", page())
        elif url.path == "/state":
            since = parse_qs(url.query).get("since", [""])[0]
            self._answer(200, "application/json", json_of(self.server.watched.state(since)))
        else:
            self._answer(404, "text/plain", "expected / or /state")

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode(errors="replace")
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a page asks every two seconds."""


class WatchServer(ThreadingHTTPServer):
    """A server of one page, on this machine's own address."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int):
        """Listen, but answer nothing yet; port 0 is any. Raises UserError where that cannot be."""
        self.watched = watched
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"--port is {port}: {error.strerror}; expected one that may be opened"
                ) from None
            raise UserError(
                f"--port is {port}, which another program uses; expected one that is free, such as "
                f"{port + 1 if port < 65535 else port - 1}, or 0 for any"
            ) from None

    @property
    def url(self) -> str:
        """Return where the page is."""
        return f"http://{ADDRESS}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of the server's; a browser that has gone is none, nor is Ctrl-C.

        That closes a connection which has just been taken (EBADF).
        """
        import sys

        error = sys.exception()
        ended = isinstance(error, OSError) and error.errno == errno.EBADF
        if not ended and not isinstance(error, ConnectionError):
            super().handle_error(request, client_address)
