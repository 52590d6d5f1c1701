"""The application: every route, every layer around them, in the order in which they stand."""

import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterd.server.adapter_api import Adapters
from adapterd.server.auth import ApiKeys, LocalHosts, admin_only
from adapterd.server.drain import ClosingConnections
from adapterd.server.envelope import EXCEPTION_HANDLERS
from adapterd.server.generate import CHAT, COMPLETIONS, Generate
from adapterd.server.health import Health
from adapterd.server.keys import KeyRing, Role
from adapterd.server.metrics_page import METRICS, ROUTER_METRICS, MetricsPage, StraightToMetrics
from adapterd.server.models import Models
from adapterd.server.openapi import openapi
from adapterd.server.state import ServerState
from adapterd.server.vllm_adapters import (
    SglangAdapters,
    VllmAdapters,
    in_sglangs_words,
    in_vllms_words,
)


def create_app(
    state: ServerState,
    *,
    allow_runtime_adapters: bool = False,
    keys: KeyRing | None = None,
    without_key: Role | None = "admin",
    local_hosts_only: bool = False,
) -> Starlette:
    """The app starts the engine and the registry with its lifespan.

    `without_key` is what a caller is who sends no key of `keys`; `local_hosts_only` is for where that is trusted
    because it comes from this machine.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with state.running():
            yield

    metrics_page = MetricsPage(state.metrics)
    app = Starlette(
        routes=routes(state, metrics_page, allow_runtime_adapters=allow_runtime_adapters),
        middleware=[
            Middleware(ClosingConnections, drain=state.drain),
            *([Middleware(LocalHosts)] if local_hosts_only else []),
            Middleware(StraightToMetrics, page=metrics_page),
            Middleware(RequestIds),
            Middleware(ApiKeys, keys=keys, without_key=without_key),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.state.metrics = state.metrics
    return app


def routes(state: ServerState, metrics_page: MetricsPage, *, allow_runtime_adapters: bool) -> list[BaseRoute]:
    health, models, adapters = Health(state), Models(state), Adapters(state)
    vllm, sglang = VllmAdapters(state), SglangAdapters(state)
    served: list[BaseRoute] = [
        Route("/v1/chat/completions", Generate(state, CHAT), methods=["POST"]),
        Route("/v1/completions", Generate(state, COMPLETIONS), methods=["POST"]),
        Route("/v1/models", models.list),
        Route("/v1/models/{model:path}", models.one),
        Route("/v1/adapters", adapters.list),
        Route("/v1/adapters/{name}", adapters.one),
        Route("/health", health.readyz),
        Route("/livez", health.livez),
        Route("/readyz", health.readyz),
        Route(METRICS, metrics_page, methods=["GET"]),
        Route(ROUTER_METRICS, metrics_page, methods=["GET"]),
        Route("/version", health.version),
        Route("/openapi.json", openapi),
    ]
    if allow_runtime_adapters:
        served += [
            Route("/v1/adapters", admin_only(adapters.load), methods=["POST"]),
            Route("/v1/adapters/{name}", admin_only(adapters.delete), methods=["DELETE"]),
            Route("/v1/adapters/{name}/update", admin_only(adapters.update), methods=["POST"]),
            Route("/v1/adapters/{name}/unload", admin_only(adapters.unload), methods=["POST"]),
            Route("/v1/adapters/{name}/rollback", admin_only(adapters.rollback), methods=["POST"]),
            Route("/v1/adapters/{name}/alias", admin_only(adapters.alias), methods=["POST"]),
            Route("/v1/adapters/{name}/aliases/{alias}", admin_only(adapters.unalias), methods=["DELETE"]),
            Route("/v1/adapters/{name}/pin", admin_only(adapters.pin), methods=["POST"]),
            Route("/v1/adapters/{name}/unpin", admin_only(adapters.unpin), methods=["POST"]),
            Route("/v1/adapters/{name}/prefetch", admin_only(adapters.prefetch), methods=["POST"]),
            Route("/v1/load_lora_adapter", in_vllms_words(admin_only(vllm.load)), methods=["POST"]),
            Route("/v1/unload_lora_adapter", in_vllms_words(admin_only(vllm.unload)), methods=["POST"]),
            Route("/load_lora_adapter", admin_only(in_sglangs_words(sglang.load)), methods=["POST"]),
            Route("/unload_lora_adapter", admin_only(in_sglangs_words(sglang.unload)), methods=["POST"]),
        ]
    return served


_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Middleware that gives every answer an `x-request-id`: the client's own if it is a plain word."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)
