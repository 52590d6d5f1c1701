"""adapters.yaml, read strictly."""

from pathlib import Path

import pytest

from adapterd.errors import ConfigError
from adapterd.manifest import Manifest, read_manifest

HEX = "0b" * 32
WHOLE = f"""
version: 1
adapters:
  support:
    source: hf://acme/support@v1
    sha256: {HEX}
    pinned: true
    aliases:
      stable: current
      canary: {{source: s3://models/support/v8, sha256: {HEX}}}
  moderation:
    source: /adapters/moderation
"""


def read(tmp_path: Path, text: str) -> Manifest:
    file = tmp_path / "adapters.yaml"
    file.write_text(text)
    return read_manifest(file)


def test_a_manifest_names_adapters_their_sources_and_aliases(tmp_path: Path) -> None:
    manifest = read(tmp_path, WHOLE)
    support, moderation = manifest.adapters.values()
    assert (support.name, str(support.current.source), support.is_pinned) == (
        "support",
        "hf://acme/support@v1",
        True,
    )
    assert support.current.hashes == {"adapter_model.safetensors": HEX}
    assert support.aliases["stable"] is None
    assert str(support.aliases["canary"].source) == "s3://models/support/v8"  # type: ignore[union-attr]
    assert (moderation.current.source.path, moderation.is_pinned, moderation.aliases) == (
        "/adapters/moderation",
        False,
        {},
    )


def test_any_difference_shows(tmp_path: Path) -> None:
    text = read(tmp_path, WHOLE).adapters["support"].text
    for old, new in (
        ("@v1", "@v2"),
        ("pinned: true", "pinned: false"),
        ("stable: current", "s: current"),
        ("v8", "v9"),
    ):
        assert read(tmp_path, WHOLE.replace(old, new)).adapters["support"].text != text
    assert read(tmp_path, WHOLE + "\n# a comment").adapters["support"].text == text


def test_none_is_a_manifest_too(tmp_path: Path) -> None:
    assert read(tmp_path, "version: 1\nadapters: {}\n").adapters == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it must be a mapping"),
        ("[]", "it must be a mapping"),
        ("version: 1", "it must have 'adapters'"),
        ("version: 2\nadapters: {}", "it has version 2"),
        ("version: true\nadapters: {}", "it has version True"),
        ("version: 1\nadapters: []", "it must have 'adapters'"),
        ("version: 1\nadapters: {}\nextra: 1", "it has an unknown key 'extra'"),
        ("version: 1\nadapters:\n  a: {source: x}\n  a: {source: y}", "line 4: 'a' occurs twice"),
        ("version: 1\nadapters:\n  a: {source: x, source: y}", "'source' occurs twice"),
        ("version: 1\nadapters: {12: {source: x}}", "put names that are numbers in quotes"),
        ("version: 1\nadapters: {../a: {source: x}}", "it names an adapter '../a'"),
        ("version: 1\nadapters: {base: {source: x}}", "it names an adapter 'base'"),
        ("version: 1\nadapters: {a: x}", "adapter 'a' must be a mapping"),
        ("version: 1\nadapters: {a: {}}", "adapter 'a': 'source' is missing"),
        ("version: 1\nadapters: {a: {source: 7}}", "adapter 'a': 'source' is missing"),
        (
            "version: 1\nadapters: {a: {source: 'ftp://x/y'}}",
            "adapter 'a': the source 'ftp://x/y' is none of",
        ),
        ("version: 1\nadapters: {a: {source: x, sha256: abc}}", "64 hexadecimal digits"),
        ("version: 1\nadapters: {a: {source: x, pinned: yes please}}", "pinned must be true or false"),
        ("version: 1\nadapters: {a: {source: x, pined: true}}", "adapter 'a' has an unknown key 'pined'"),
        ("version: 1\nadapters: {a: {source: x, aliases: [s]}}", "aliases must be a mapping"),
        ("version: 1\nadapters: {a: {source: x, aliases: {1: current}}}", "alias 1"),
        ("version: 1\nadapters: {a: {source: x, aliases: {s: 3}}}", "alias 's' must be 'current'"),
        ("version: 1\nadapters: {a: {source: x, aliases: {s: {}}}}", "alias 's': 'source' is missing"),
        ("version: 1\nadapters: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: [", "line 1"),
        ("[" * 1000, "nested too deeply"),
        ("{a: &x [*x]}", ""),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, text)
    assert reason in refusal.value.message
    assert "adapters.yaml" in refusal.value.message


def test_a_manifest_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the manifest"):
        read_manifest(tmp_path / "nowhere.yaml")
