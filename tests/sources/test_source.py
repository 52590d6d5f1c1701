"""What a source may be, and what an operator's patterns allow."""

from pathlib import Path

import pytest

from adapterd.errors import ConfigError, Forbidden, InvalidRequest
from adapterd.sources.allow import AllowList
from adapterd.sources.source import Source, hashes_from, hashes_text, parse_declared, parse_source

HEX = "ab" * 32


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("adapters/support", Source("file", "", "adapters/support")),
        ("/models/a b", Source("file", "", "/models/a b")),
        ("file:///models/a", Source("file", "", "/models/a")),
        ("hf://acme/support", Source("hf", "acme", "support")),
        ("hf://acme/support@v1.0", Source("hf", "acme", "support", "v1.0")),
        ("hf://acme/support@refs%2Fpr%2F3/sub/dir", Source("hf", "acme", "support/sub/dir", "refs/pr/3")),
        ("s3://models/support/v8/", Source("s3", "models", "support/v8")),
        ("gs://models/x=1", Source("gs", "models", "x=1")),
        ("HTTPS://Models.Example.com:443/a/b", Source("https", "models.example.com", "a/b")),
        ("https://[::1]:8443/a", Source("https", "[::1]:8443", "a")),
    ],
)
def test_a_source_is_read_and_written_again(text: str, source: Source) -> None:
    parsed, hashes = parse_source(text)
    assert (parsed, dict(hashes)) == (source, {})
    assert parse_source(str(parsed))[0] == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "a\nb",
        "x" * 3000,
        "ftp://host/a",
        "memory://a/b",
        "file://host/a",
        "hf://support",
        "hf://acme/support@",
        "hf://acme/support@../x",
        "hf://acme/../support",
        "s3://bucket",
        "s3://user:hunter2@bucket/a",
        "s3://bucket/../other/a",
        "s3://bucket/a//b",
        "s3://bucket/*",
        "https://host/a/%2e%2e/b",
        "https://host/a?token=hunter2",
        "https://host/./a",
        "https://user@host/a",
        "https://ho st/a",
        "https:///a",
        "hf://acme/support#md5=1",
        "hf://acme/support#sha256=12",
    ],
)
def test_what_can_be_no_source_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_source(text)
    assert "hunter2" not in refusal.value.message


def test_hashes_are_of_the_weights_or_of_every_file() -> None:
    assert parse_source(f"hf://a/b#sha256={HEX}")[1] == {"adapter_model.safetensors": HEX}
    every = {"adapter_model.safetensors": HEX.upper(), "adapter_config.json": HEX}
    _, hashes = parse_declared("s3://a/b", every)
    assert hashes == {"adapter_model.safetensors": HEX, "adapter_config.json": HEX}
    assert hashes_from(hashes_text(hashes)) == hashes
    for wrong in ({"adapter_config.json": HEX}, {"../x": HEX}, {}, 7, "0", {"adapter_model.safetensors": 1}):
        with pytest.raises(InvalidRequest):
            parse_declared("s3://a/b", wrong)
    with pytest.raises(InvalidRequest, match="give it once"):
        parse_declared(f"s3://a/b#sha256={HEX}", HEX)


def test_plain_http_needs_a_hash() -> None:
    with pytest.raises(InvalidRequest, match="anyone on the way can change"):
        parse_declared("http://models/a")
    assert parse_declared("http://models/a", HEX)[0].scheme == "http"


@pytest.mark.parametrize(
    ("pattern", "source", "allowed"),
    [
        ("hf://acme/*", "hf://acme/support@v1", True),
        ("hf://acme/*", "hf://acme/support/folder", True),
        ("hf://acme/*", "hf://acme-evil/support", False),
        ("hf://acme/support", "hf://acme/support@main", True),
        ("hf://acme/support", "hf://acme/support2", False),
        ("hf://*/*", "s3://acme/support", False),
        ("s3://models/team-a/*", "s3://models/team-a/x/y", True),
        ("s3://models/team-a/*", "s3://models/team-b/x", False),
        ("https://*.example.com/*", "https://models.example.com/a", True),
        ("https://*.example.com/*", "https://evil.test/a.example.com/b", False),
        ("https://example.com/*", "https://example.com:8443/a", False),
        ("https://example.com/*", "http://example.com/a", False),
        ("https://example.com:443/*", "https://example.com/a", True),
        ("https://exampleXcom/*", "https://example.com/a", False),
    ],
)
def test_a_pattern_allows_what_it_says_and_no_more(pattern: str, source: str, allowed: bool) -> None:
    parsed, _ = parse_source(source)
    assert AllowList([pattern]).allows(parsed) is allowed


def test_nothing_remote_is_allowed_without_a_pattern() -> None:
    with pytest.raises(Forbidden, match="--allow-source") as refusal:
        AllowList(["/models"]).check(parse_source("hf://acme/support")[0])
    assert refusal.value.code == "source_not_allowed"


def test_directories_are_roots() -> None:
    assert AllowList(["/mnt/a", "/mnt/b/*", "hf://x/*"]).roots == (Path("/mnt/a"), Path("/mnt/b"))


@pytest.mark.parametrize(
    "pattern", ["mnt/a", "/mnt/*/a", "/mnt/../a", "ftp://x/*", "hf://acme", "s3://b/a?x", ""]
)
def test_what_can_be_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        AllowList([pattern])
