"""The web page: one file, and the newest sample beside it."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from kvstore.clock import Clock, SystemClock
from kvstore.errors import ConcertinaError

from .watch import Watch

#: However many browsers look on, the cluster is asked no more often than this.
MIN_INTERVAL_S = 1.0
SOCKET_TIMEOUT_S = 10.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class ConsoleServer(ThreadingHTTPServer):
    """Serves ``/`` and ``/sample``.

    Parameters
    ----------
    address : (host, port)
    name : str
        Shown on the page.
    watch : Watch
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], name: str, watch: Watch, clock: Clock | None = None) -> None:
        super().__init__(address, _Handler)
        self.page = files("services.console").joinpath("page.html").read_bytes()
        self._name = name
        self._watch = watch
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._newest: dict[str, Any] | None = None
        self._at = 0.0

    def sample(self) -> dict[str, Any]:
        """The newest sample, taken now if it is old. Raises TransportError or DeadlineError where Redis does not answer."""
        with self._lock:
            now = self._clock.now()
            if self._newest is None or now - self._at >= MIN_INTERVAL_S:
                self._newest, self._at = {"name": self._name, **self._watch.sample()}, now
            return self._newest


class _Handler(BaseHTTPRequestHandler):
    server: ConsoleServer
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path == "/":
            self._reply(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/sample":
            try:
                status, found = HTTPStatus.OK, self.server.sample()
            except ConcertinaError as error:
                status, found = HTTPStatus.BAD_GATEWAY, {"error": str(error)}
            self._reply(status, "application/json", json.dumps(found).encode())
        else:
            self._reply(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there are / and /sample\n")

    def _reply(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page asks every two seconds."""
