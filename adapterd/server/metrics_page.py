"""/metrics and /metrics/router, answered without routing: routers ask twenty times a second each.

What starlette does for a request, and the layers around it, take as long as the page itself does.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from adapterd.exposition import CONTENT_TYPES, accepted_format
from adapterd.metrics import Metrics

METRICS = "/metrics"
ROUTER_METRICS = "/metrics/router"
"""The series that routers read: a small part of all."""

PATHS = frozenset({METRICS, ROUTER_METRICS})


class MetricsPage:
    """The endpoint of both: a bare ASGI application. Plain text, unless `Accept` names the other format."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
        format = accepted_format(accept.decode("latin-1"))
        body = self._metrics.render(format, for_router=scope["path"] == ROUTER_METRICS)
        headers = [
            (b"content-type", CONTENT_TYPES[format].encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # A server leaves the body of an answer to HEAD away.
        await send({"type": "http.response.body", "body": body})


class StraightToMetrics:
    """Middleware that hands GET and HEAD of the two to `page`, and all else on, other methods of them too."""

    def __init__(self, app: ASGIApp, page: MetricsPage) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"] in PATHS and scope["method"] in ("GET", "HEAD")
        await (self._page if is_page else self._app)(scope, receive, send)
