"""/openapi.json describes what is served, no more and no less."""

import httpx
import pytest
from starlette.routing import Route

from adapterd.server.app import create_app
from adapterd.server.openapi import openapi_document
from adapterd.server.protocol import ChatCompletionRequest
from adapterd.server.state import ServerState


def test_every_route_is_described_and_nothing_else(state: ServerState) -> None:
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in create_app(state, allow_runtime_adapters=True).routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {
        (path, method) for path, operations in openapi_document()["paths"].items() for method in operations
    }
    assert described == served


def test_a_body_lists_every_field_and_takes_no_other() -> None:
    schema = openapi_document()["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["properties"].keys() == ChatCompletionRequest.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["messages"]["type"] == "array"


def test_every_reference_leads_somewhere() -> None:
    document = openapi_document()
    schemas = document["components"]["schemas"]

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for item in node for ref in references(item)] if isinstance(node, list) else []

    found = references(document)
    assert found
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= schemas.keys()


@pytest.mark.anyio
async def test_it_is_served(client: httpx.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json() == openapi_document()
