"""GET /openapi.json, made from the models that check requests and the types that answers are built of."""

import re
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import adapterd
from adapterd.server.adapter_bodies import (
    AliasBody,
    EmptyBody,
    LoadAdapterRequest,
    LoadBody,
    RollbackBody,
    SglangLoadRequest,
    SglangUnloadRequest,
    UnloadAdapterRequest,
    UnloadBody,
    UpdateBody,
)
from adapterd.server.adapter_cards import AdapterCard, AdapterList, Unloaded
from adapterd.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from adapterd.server.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorEnvelope,
    ModelCard,
    ModelList,
)

Schema = dict[str, Any]

# path, method, what it does, body, answer, one event of the streamed answer
OPERATIONS: tuple[tuple[str, str, str, Any, Any, Any], ...] = (
    (
        "/v1/chat/completions",
        "post",
        "Answer a chat",
        ChatCompletionRequest,
        ChatCompletion,
        ChatCompletionChunk,
    ),
    ("/v1/completions", "post", "Continue a text", CompletionRequest, Completion, Completion),
    ("/v1/models", "get", "The base and its adapters", None, ModelList, None),
    ("/v1/models/{model}", "get", "One of them", None, ModelCard, None),
    ("/v1/adapters", "get", "Every adapter: versions, where it lies, what it does", None, AdapterList, None),
    ("/v1/adapters/{name}", "get", "One of them", None, AdapterCard, None),
    ("/v1/adapters", "post", "Load an adapter (if allowed)", LoadBody, AdapterCard, None),
    (
        "/v1/adapters/{name}",
        "delete",
        "Unload it and forget its versions (?deadline_seconds, ?abort)",
        None,
        Unloaded,
        None,
    ),
    (
        "/v1/adapters/{name}/update",
        "post",
        "Read its source again, or another one",
        UpdateBody,
        AdapterCard,
        None,
    ),
    (
        "/v1/adapters/{name}/unload",
        "post",
        "Serve it no more; answers when its memory is back",
        UnloadBody,
        Unloaded,
        None,
    ),
    ("/v1/adapters/{name}/rollback", "post", "Back to the version before", RollbackBody, AdapterCard, None),
    ("/v1/adapters/{name}/alias", "post", "Let an alias mean a version", AliasBody, AdapterCard, None),
    ("/v1/adapters/{name}/aliases/{alias}", "delete", "Remove an alias", None, AdapterCard, None),
    ("/v1/adapters/{name}/pin", "post", "Keep it in host and device memory", EmptyBody, AdapterCard, None),
    ("/v1/adapters/{name}/unpin", "post", "Keep it no longer", EmptyBody, AdapterCard, None),
    (
        "/v1/adapters/{name}/prefetch",
        "post",
        "Have it in memory before it is asked for",
        EmptyBody,
        AdapterCard,
        None,
    ),
    ("/v1/load_lora_adapter", "post", "Load an adapter (if allowed)", LoadAdapterRequest, None, None),
    ("/v1/unload_lora_adapter", "post", "Unload an adapter (if allowed)", UnloadAdapterRequest, None, None),
    ("/load_lora_adapter", "post", "The same in SGLang's words", SglangLoadRequest, None, None),
    ("/unload_lora_adapter", "post", "The same in SGLang's words", SglangUnloadRequest, None, None),
    ("/health", "get", "Ready to serve", None, None, None),
    ("/livez", "get", "Alive", None, None, None),
    ("/readyz", "get", "Ready to serve", None, None, None),
    ("/metrics", "get", "Prometheus metrics", None, None, None),
    ("/metrics/router", "get", "Those of them that routers read", None, None, None),
    ("/version", "get", "Version of the server", None, None, None),
    ("/openapi.json", "get", "This document", None, None, None),
)


async def openapi(request: Request) -> Response:
    return JSONResponse(openapi_document())


def openapi_document() -> Schema:
    types = {kind for *_, body, answer, event in OPERATIONS for kind in (body, answer, event) if kind}
    refs, definitions = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in (*types, ErrorEnvelope)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = dict(definitions["$defs"])
    paths: dict[str, Schema] = {}
    for path, method, summary, body, answer, event in OPERATIONS:
        operation: Schema = {
            "summary": summary,
            "responses": {
                "200": {"description": "OK", "content": _content(refs, answer, event)},
                "4XX": {
                    "description": "Error",
                    "content": {"application/json": {"schema": refs[ErrorEnvelope, "validation"]}},
                },
            },
        }
        if parameters := re.findall(r"\{(\w+)\}", path):
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in parameters
            ]
        if body is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": refs[body, "validation"]}},
            }
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "adapterd", "version": adapterd.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _content(refs: Any, answer: Any, event: Any) -> Schema:
    content: Schema = {}
    if answer is not None:
        content["application/json"] = {"schema": refs[answer, "validation"]}
    if event is not None:
        content["text/event-stream"] = {"schema": refs[event, "validation"]}
    return content
