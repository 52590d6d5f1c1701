"""API keys, and the refusal to be reached from outside without them."""

import hashlib
from pathlib import Path

import pytest

from adapterd.errors import ConfigError
from adapterd.server.auth import OPEN_PATHS, check_exposure, read_key_hashes
from adapterd.server.state import ServerState
from tests.server.conftest import asking

KEYS = tuple(hashlib.sha256(key).digest() for key in (b"first", b"second"))


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
async def test_without_a_known_key_every_closed_path_is_401(state: ServerState, headers: object) -> None:
    async with asking(state, key_hashes=KEYS) as client:
        for path in ("/v1/models", "/v1/chat/completions", "//v1/models", "/nowhere", "/openapi.json"):
            for method in ("GET", "POST", "OPTIONS"):
                response = await client.request(method, path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.anyio
@pytest.mark.parametrize("header", ["Bearer first", "Bearer second", "bearer first"])
async def test_any_of_the_keys_opens(state: ServerState, header: str) -> None:
    async with asking(state, key_hashes=KEYS) as client:
        assert (await client.get("/v1/models", headers={"authorization": header})).status_code == 200


@pytest.mark.anyio
async def test_probes_and_metrics_stay_open(state: ServerState) -> None:
    async with asking(state, key_hashes=KEYS) as client:
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the first team\nfirst\n\n  second  \n")
    assert read_key_hashes(file) == KEYS
    file.write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_key_hashes(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_key_hashes(tmp_path / "missing")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    check_exposure(host, has_keys=False, insecure_no_auth=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_others_can_reach_it_only_with_keys_or_by_insisting(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        check_exposure(host, has_keys=False, insecure_no_auth=False)
    check_exposure(host, has_keys=True, insecure_no_auth=False)
    check_exposure(host, has_keys=False, insecure_no_auth=True)
