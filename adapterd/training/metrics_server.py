"""GET /metrics of a training run, from a thread of its own: training does not wait for whoever asks.

Python's own server, since training needs no web framework: one page, one answer a connection.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from adapterd.errors import ConfigError
from adapterd.exposition import CONTENT_TYPES, accepted_format
from adapterd.training.metrics import TrainingMetrics

_logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@contextmanager
def metrics_served(metrics: TrainingMetrics, host: str, port: int | None) -> Iterator[None]:
    """Answers while the context lasts, if there is a `port`; the log says where, since 0 takes any that is free.

    Raises ConfigError if it cannot listen there.
    """
    if port is None:
        yield
        return
    try:
        server = _Server(metrics, host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --metrics-host or --metrics-port",
            param="metrics_port",
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="adapterd-training-metrics", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    _logger.info("metrics of this run are on http://%s:%d/metrics", shown, server.server_address[1])
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, metrics: TrainingMetrics, host: str, port: int) -> None:
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Page)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's concern, and not the training's."""
        _logger.debug("a scrape failed", exc_info=True)


class _Page(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds for a client to say what it wants
    server_version = "adapterd"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "only /metrics is served here")
            return
        format = accepted_format(self.headers.get("accept", ""))
        body = self.server.metrics.render(format)
        self.send_response(HTTPStatus.OK)
        self.send_header("content-type", CONTENT_TYPES[format])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No line a scrape."""
