"""Loading and unloading at run time, as the controllers that call vLLM's endpoints expect it."""

import httpx
import pytest

from adapterd.server.state import ServerState
from tests.server.conftest import asking
from tests.server.fakes import FakeDaemon

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SGLANG_LOAD, SGLANG_UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"


@pytest.mark.anyio
async def test_load_and_unload_answer_in_vllms_words(client: httpx.AsyncClient) -> None:
    body = {"lora_name": "new", "lora_path": "new", "base_model_name": "sent by a controller"}
    response = await client.post(LOAD, json=body)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    response = await client.post(UNLOAD, json={"lora_name": "new", "lora_int_id": 3})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "sentence"),
    [
        (LOAD, {}, 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        (LOAD, {"lora_name": "x", "lora_path": None}, 400, "InvalidUserInput", "must be provided."),
        (
            LOAD,
            {"lora_name": "support", "lora_path": "x"},
            400,
            "InvalidUserInput",
            "has already been loaded",
        ),
        (LOAD, {"lora_name": "x", "lora_path": "missing"}, 400, "InvalidUserInput", "no adapter at missing"),
        (LOAD, {"lora_name": "x", "lora_path": "../etc"}, 404, "NotFoundError", "no folder below"),
        (UNLOAD, {}, 400, "InvalidUserInput", "'lora_name' needs to be provided"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "NotFoundError", "'nobody' cannot be found."),
        (LOAD, {"lora_name": 3, "lora_path": "x"}, 400, "InvalidUserInput", "lora_name"),
        (LOAD, {"lora_name": "owned", "lora_path": "x"}, 409, "InvalidUserInput", "owned by the manifest"),
        (UNLOAD, {"lora_name": "owned"}, 409, "InvalidUserInput", "owned by the manifest"),
    ],
)
async def test_errors_carry_vllms_type_nested_and_at_the_top(
    client: httpx.AsyncClient,
    state: ServerState,
    path: str,
    body: dict[str, object],
    status: int,
    kind: str,
    sentence: str,
) -> None:
    response = await client.post(path, json=body)
    error = response.json()
    assert response.status_code == status
    assert error["type"] == error["error"]["type"] == kind
    assert sentence in error["message"]
    assert error["message"] == error["error"]["message"]
    # Controllers take that sentence for a success.
    assert ("already" in error["message"]) == (body.get("lora_name") == "support")
    assert f'adapterd_errors_total{{code="{error["error"]["code"]}"}} 1.0' in state.metrics.render().decode()


@pytest.mark.anyio
async def test_load_inplace_replaces(client: httpx.AsyncClient) -> None:
    body = {"lora_name": "support", "lora_path": "x", "load_inplace": True}
    assert (await client.post(LOAD, json=body)).status_code == 200


@pytest.mark.anyio
async def test_sglangs_calls_answer_in_its_words(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    body = {"lora_name": "new", "lora_path": "new", "pinned": True, "added_tokens_config": None}
    response = await client.post(SGLANG_LOAD, json=body)
    loaded = {"support": "adapters/support", "new": "new"}
    assert (response.status_code, response.json()) == (200, {"success": True, "loaded_adapters": loaded})
    assert daemon.registry.entries["new"].is_pinned
    response = await client.post(SGLANG_UNLOAD, json={"lora_name": "new"})
    assert response.json() == {"success": True, "loaded_adapters": {"support": "adapters/support"}}
    for path in (SGLANG_LOAD, SGLANG_UNLOAD):
        response = await client.post(path, json={"lora_name": "nobody", "lora_path": "missing"})
        assert (response.status_code, response.json()["success"]) == (400, False)
        assert response.json()["error_message"]
    for body, words in (
        ({"lora_name": "support", "lora_path": "x"}, "unload it first"),
        ({"lora_name": 3}, "lora_name"),
    ):
        response = await client.post(SGLANG_LOAD, json=body)
        assert (response.status_code, response.json()["success"]) == (400, False)
        assert words in response.json()["error_message"]


@pytest.mark.anyio
async def test_all_are_404_unless_allowed(state: ServerState) -> None:
    async with asking(state) as client:
        for path in (LOAD, UNLOAD, SGLANG_LOAD, SGLANG_UNLOAD):
            response = await client.post(path, json={"lora_name": "x", "lora_path": "x"})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


def test_on_the_real_daemon_new_requests_use_what_was_loaded(server_url: str) -> None:
    def answer(model: str) -> httpx.Response:
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        return httpx.post(f"{server_url}/v1/completions", json=body)

    assert answer("copy").status_code == 404
    loaded = httpx.post(f"{server_url}{LOAD}", json={"lora_name": "copy", "lora_path": "support"})
    assert loaded.status_code == 200, loaded.text
    copy, support = answer("copy"), answer("support")
    assert copy.json()["model"] == "tiny:copy"
    assert copy.json()["choices"] == support.json()["choices"]
    assert copy.headers["x-adapterd-digest"] == support.headers["x-adapterd-digest"]
    again = httpx.post(f"{server_url}{LOAD}", json={"lora_name": "copy", "lora_path": "support"})
    assert again.status_code == 200, again.text
    other = httpx.post(f"{server_url}{LOAD}", json={"lora_name": "copy", "lora_path": "medical"})
    assert (other.status_code, "has already been loaded" in other.json()["message"]) == (400, True)
    body = {"lora_name": "copy", "lora_path": "medical", "load_inplace": True}
    assert httpx.post(f"{server_url}{LOAD}", json=body).status_code == 200
    assert answer("copy").json()["choices"] == answer("medical").json()["choices"]
    assert httpx.post(f"{server_url}{UNLOAD}", json={"lora_name": "copy"}).status_code == 200
    assert answer("copy").status_code == 404


@pytest.mark.parametrize("path", ["..", "../tiny", "/etc", "support/../../tiny", "a\x00b", "%2e%2e"])
def test_on_the_real_daemon_no_path_leads_out_of_the_adapter_directories(server_url: str, path: str) -> None:
    response = httpx.post(f"{server_url}{LOAD}", json={"lora_name": "evil", "lora_path": path})
    assert (response.status_code, response.json()["type"]) == (404, "NotFoundError")
