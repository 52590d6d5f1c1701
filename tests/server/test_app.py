"""What holds for every route: the envelope of errors, the request id."""

import httpx
import pytest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat/completion", "/V1/models", "/v1/models/../x/y"])
async def test_an_unknown_path_is_404_unknown_url(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={})
    assert response.status_code in (404, 405)
    if response.status_code == 404:
        assert response.json()["error"]["code"] == "unknown_url"
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_method_that_is_not_served_is_405_and_says_which_is(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


async def test_every_answer_has_a_request_id(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/v1/models", "/nowhere"):
        assert (await client.get(path)).headers["x-request-id"].startswith("req_")
    named = await client.get("/livez", headers={"x-request-id": "trace-7"})
    assert named.headers["x-request-id"] == "trace-7"
    forged = await client.get("/livez", headers={"x-request-id": "a b\tc"})
    assert forged.headers["x-request-id"].startswith("req_")


async def test_errors_are_counted_by_code(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    await client.get("/nowhere")
    page = (await client.get("/metrics")).text
    assert 'adapterd_errors_total{code="model_not_found"} 1.0' in page
    assert 'adapterd_errors_total{code="unknown_url"} 1.0' in page
