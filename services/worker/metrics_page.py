"""The metrics page of one replica."""

from __future__ import annotations

import logging
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

log = logging.getLogger(__name__)


class MetricsPage:
    """Serves `registry` over HTTP. Where the asked port is taken, by another replica on this host, a free one is used.

    Parameters
    ----------
    registry : CollectorRegistry
    listen : str
        ``host:port``; port 0 takes a free one.
    """

    def __init__(self, registry: CollectorRegistry, listen: str) -> None:
        self._registry = registry
        host, _, port = listen.rpartition(":")
        self._host = host.strip("[]") or "127.0.0.1"
        self._port = int(port)
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    @property
    def address(self) -> str | None:
        """``host:port`` that it is served on; None before `start`."""
        return f"{self._host}:{self._server.server_port}" if self._server else None

    def start(self) -> None:
        """Listen."""
        try:
            self._server, self._thread = self._serve(self._port)
        except OSError:
            if not self._port:
                raise
            self._server, self._thread = self._serve(0)
            log.info("metrics port %d is taken; using %s", self._port, self.address)

    def stop(self) -> None:
        """Give the port back. Safe to call without `start`."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, port: int) -> tuple[WSGIServer, Thread]:
        return start_http_server(port, addr=self._host, registry=self._registry)
