"""Who may ask, who may change what is served, and the refusal to be reached from outside without keys."""

from pathlib import Path

import pytest
from starlette.routing import Route

from adapterd.errors import ConfigError
from adapterd.server.app import create_app
from adapterd.server.auth import OPEN_PATHS, check_exposure, trusts_this_machine, without_key
from adapterd.server.keys import KeyRing
from adapterd.server.state import ServerState
from tests.server.conftest import asking
from tests.server.fakes import FakeDaemon

LOADS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter")
GENERATES = {"/v1/chat/completions", "/v1/completions"}


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    (tmp_path / "keys").write_text("first\nsecond\nboss role=admin\n")
    return KeyRing([(tmp_path / "keys", "client")])


@pytest.fixture
def admin_keys(tmp_path: Path) -> KeyRing:
    (tmp_path / "admins").write_text("boss\n")
    return KeyRing([(tmp_path / "admins", "admin")])


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic first"},
        {"authorization": "first"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"authorization": b"Bearer \xff\xfe"},
        [("authorization", "Bearer first"), ("authorization", "Bearer wrong")],
    ],
)
async def test_without_a_known_key_every_closed_path_is_401(
    state: ServerState, keys: KeyRing, headers: object
) -> None:
    async with asking(state, keys=keys, without_key=None, allow_runtime_adapters=True) as client:
        for path in (
            "/v1/models",
            "/v1/chat/completions",
            "//v1/models",
            "/nowhere",
            "/openapi.json",
            *LOADS,
        ):
            for method in ("GET", "POST", "OPTIONS"):
                response = await client.request(method, path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.anyio
@pytest.mark.parametrize("header", ["Bearer first", "Bearer second", "bearer first", "Bearer boss"])
async def test_any_of_the_keys_opens(state: ServerState, keys: KeyRing, header: str) -> None:
    async with asking(state, keys=keys, without_key=None) as client:
        assert (await client.get("/v1/models", headers={"authorization": header})).status_code == 200


@pytest.mark.anyio
async def test_prefixes_are_shared_within_a_key_and_a_salt_alone(
    daemon: FakeDaemon, state: ServerState, keys: KeyRing
) -> None:
    callers = [("first", None), ("second", None), ("first", "a"), ("first", "b"), ("second", "a")]
    async with asking(state, keys=keys, without_key=None) as client:
        for key, salt in [*callers, *callers]:
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "cache_salt": salt}
            response = await client.post(
                "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
            )
            assert response.status_code == 200
    scopes = [request.prefix_scope for request in daemon.engine.requests]
    assert len(set(scopes)) == len(callers)
    assert scopes[: len(callers)] == scopes[len(callers) :]


@pytest.mark.anyio
async def test_without_keys_all_share_but_who_salts(daemon: FakeDaemon, state: ServerState) -> None:
    async with asking(state) as client:
        for salt in (None, "a"):
            body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "cache_salt": salt}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    plain, salted = (request.prefix_scope for request in daemon.engine.requests)
    assert plain == b""
    assert salted


@pytest.mark.anyio
async def test_probes_and_metrics_stay_open(state: ServerState, keys: KeyRing) -> None:
    async with asking(state, keys=keys, without_key=None) as client:
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200


@pytest.mark.anyio
async def test_only_an_admins_key_changes_what_is_served(state: ServerState, keys: KeyRing) -> None:
    body = {"lora_name": "x", "lora_path": "x"}
    async with asking(state, keys=keys, without_key=None, allow_runtime_adapters=True) as client:
        for path in LOADS:
            refused = await client.post(path, json=body, headers={"authorization": "Bearer first"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        allowed = await client.post(LOADS[0], json=body, headers={"authorization": "Bearer boss"})
        assert allowed.status_code == 200


@pytest.mark.anyio
async def test_with_admins_keys_alone_clients_may_be_unknown(state: ServerState, admin_keys: KeyRing) -> None:
    """Somebody in front checks the clients; nobody in front can tell an admin."""
    body = {"lora_name": "x", "lora_path": "x"}
    role = without_key(admin_keys, insecure_no_auth=True)
    async with asking(state, keys=admin_keys, without_key=role, allow_runtime_adapters=True) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": "Bearer none"})).status_code == 200
        assert (await client.post(LOADS[0], json=body)).status_code == 403
        boss = {"authorization": "Bearer boss"}
        assert (await client.post(LOADS[0], json=body, headers=boss)).status_code == 200


@pytest.mark.anyio
async def test_every_route_that_changes_something_asks_for_an_admin(
    state: ServerState, keys: KeyRing
) -> None:
    client_key = {"authorization": "Bearer first"}
    async with asking(state, keys=keys, without_key=None, allow_runtime_adapters=True) as client:
        changing = 0
        for route in create_app(state, allow_runtime_adapters=True).routes:
            assert isinstance(route, Route)
            for method in (route.methods or set()) - {"GET", "HEAD"}:
                if route.path not in GENERATES:
                    changing += 1
                    path = route.path.replace("{", "").replace("}", "")
                    response = await client.request(method, path, headers=client_key)
                    assert response.status_code == 403, f"{method} {route.path}"
        assert changing >= len(LOADS)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("LocalHost.:8000", True),
        ("adapterd.localhost", True),
        ("host.docker.internal:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.0.0.7", True),
        ("", True),
        ("rebound.example", False),
        ("rebound.example:8000", False),
        ("127.0.0.1.rebound.example", False),
        ("localhost.rebound.example", False),
        ("[rebound.example]", False),
        ("notlocalhost", False),
    ],
)
async def test_a_machine_that_trusts_itself_answers_under_names_that_nobody_owns(
    state: ServerState, host: str, is_answered: bool
) -> None:
    async with asking(state, local_hosts_only=True) as client:
        for path in ("/v1/models", "/metrics", "/livez"):
            response = await client.get(path, headers={"host": host})
            assert response.status_code == (200 if is_answered else 403), path
            assert is_answered or response.json()["error"]["code"] == "host_not_allowed"
    async with asking(state) as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


def test_only_without_keys_and_on_a_loopback_address_does_a_machine_trust_itself(keys: KeyRing) -> None:
    assert trusts_this_machine("127.0.0.1", None, insecure_no_auth=False)
    assert trusts_this_machine("localhost", None, insecure_no_auth=False)
    assert not trusts_this_machine("127.0.0.1", None, insecure_no_auth=True)
    assert not trusts_this_machine("127.0.0.1", keys, insecure_no_auth=False)
    assert not trusts_this_machine("0.0.0.0", None, insecure_no_auth=True)


def allowed(host: str, keys: KeyRing | None, *, insecure: bool = False, runtime: bool = False) -> bool:
    try:
        check_exposure(
            host,
            has_keys=keys is not None,
            has_admin_keys=keys is not None and keys.has("admin"),
            insecure_no_auth=insecure,
            allow_runtime_adapters=runtime,
        )
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    assert allowed(host, None)
    assert allowed(host, None, runtime=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_others_can_reach_it_only_with_keys_or_by_insisting(host: str, keys: KeyRing) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        check_exposure(host, has_keys=False, insecure_no_auth=False)
    assert allowed(host, keys)
    assert allowed(host, None, insecure=True)


def test_adapters_change_at_run_time_only_under_an_admins_key(
    tmp_path: Path, keys: KeyRing, admin_keys: KeyRing
) -> None:
    (tmp_path / "plain").write_text("first\n")
    plain = KeyRing([(tmp_path / "plain", "client")])
    assert not allowed("0.0.0.0", None, insecure=True, runtime=True)
    assert not allowed("127.0.0.1", None, insecure=True, runtime=True)
    assert not allowed("0.0.0.0", plain, runtime=True)
    assert not allowed("127.0.0.1", plain, runtime=True)
    assert allowed("0.0.0.0", keys, runtime=True)
    assert allowed("0.0.0.0", admin_keys, insecure=True, runtime=True)


def test_who_sends_no_key(keys: KeyRing, admin_keys: KeyRing) -> None:
    assert without_key(None, insecure_no_auth=True) == "admin"
    assert without_key(keys, insecure_no_auth=True) is None
    assert without_key(admin_keys, insecure_no_auth=True) == "client"
    assert without_key(admin_keys, insecure_no_auth=False) is None
