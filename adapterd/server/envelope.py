"""Every error as OpenAI writes it: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler

from adapterd.errors import AdapterdError, Overloaded, Unavailable
from adapterd.metrics import Metrics

_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}
CLIENT_CLOSED_REQUEST = 499
"""What the log says of a client that went away; nobody is there to read it."""


def envelope(error: AdapterdError) -> dict[str, Any]:
    return _body(error.message, error.type, error.param, error.code)


def _body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_response(error: AdapterdError) -> JSONResponse:
    return JSONResponse(envelope(error), status_code=error.status, headers=error_headers(error))


def error_headers(error: AdapterdError) -> dict[str, str]:
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def count_error(metrics: Metrics, error: AdapterdError) -> None:
    """For whoever answers with an error, with whatever words or status."""
    metrics.count("adapterd_errors_total", error.code or error.type)


async def on_adapterd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterdError)
    count_error(request.app.state.metrics, error)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: a path that is not there, a method that is not allowed."""
    assert isinstance(error, HTTPException)
    url = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message = f"Unknown request URL: {url}. GET /openapi.json lists what is served."
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}."
    else:
        message = error.detail
    code = _HTTP_CODES.get(error.status_code)
    request.app.state.metrics.count("adapterd_errors_total", code or "invalid_request_error")
    body = _body(message, "invalid_request_error", None, code)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours, in mid-stream too. The log has its traceback; the client learns only that it was not its fault."""
    request.app.state.metrics.count("adapterd_errors_total", "internal_error")
    return JSONResponse(INTERNAL_ERROR, status_code=500)


INTERNAL_ERROR = _body("internal error; the server's log says more", "server_error", None, "internal_error")

EXCEPTION_HANDLERS: dict[Any, ExceptionHandler] = {
    AdapterdError: on_adapterd_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_unexpected,
}
