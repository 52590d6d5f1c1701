"""API keys in files and folders."""

import hashlib
import os
from pathlib import Path

import pytest

from adapterd.errors import ConfigError
from adapterd.server.keys import KeyRing

HASHED = "sha256:" + hashlib.sha256(b"hashed").hexdigest()


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def ring(*files: Path) -> KeyRing:
    return KeyRing([(file, "client") for file in files])


def test_keys_are_one_a_line_plain_or_hashed_with_or_without_a_role(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the first team\nplain\n\n  {HASHED}  role=admin\nthird role=client\r\n")
    keys = ring(file)
    assert [keys.role_of(key) for key in (b"plain", b"hashed", b"third")] == ["client", "admin", "client"]
    assert [keys.role_of(key) for key in (b"", b"#", b"role=admin", HASHED.encode(), b"plain ")] == [None] * 5


def test_a_folder_is_a_mounted_secret(tmp_path: Path) -> None:
    """Kubernetes shows each key of a Secret as a link into a hidden folder that it swaps whole."""
    data = tmp_path / "..2026"
    data.mkdir()
    (data / "team-a").write_text("a")
    (data / "team-b").write_text("b")
    (tmp_path / "..data").symlink_to(data)
    for name in ("team-a", "team-b"):
        (tmp_path / name).symlink_to(tmp_path / "..data" / name)
    keys = ring(tmp_path)
    assert [keys.role_of(key) for key in (b"a", b"b", b"c")] == ["client", "client", None]


def test_a_file_may_be_of_admins_keys_and_the_greater_right_holds(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("both\nclient\n")
    (tmp_path / "admins").write_text("both\nadmin\n")
    keys = KeyRing([(tmp_path / "admins", "admin"), (tmp_path / "clients", "client")])
    assert [keys.role_of(key) for key in (b"both", b"client", b"admin")] == ["admin", "client", "admin"]


def test_keys_that_are_replaced_hold_after_a_moment_and_broken_ones_change_nothing(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text("old")
    keys = KeyRing([(file, "client")], clock=clock)

    def replace(text: str) -> None:
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", file)
        clock.seconds += 3

    replace("new")
    assert [keys.role_of(key) for key in (b"old", b"new")] == [None, "client"]
    for broken in ("", "sha256:xyz", "a b c"):
        replace(broken)
        assert keys.role_of(b"new") == "client"
    file.unlink()
    clock.seconds += 3
    assert keys.role_of(b"new") == "client"
    replace("newest")
    assert [keys.role_of(key) for key in (b"new", b"newest")] == [None, "client"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no API key"),
        ("# nobody yet\n", "holds no API key"),
        ("ok\nSECRET role=root\n", "line 2 of .*'role=admin' or 'role=client'"),
        ("SECRET SECRET\n", "line 1 of"),
        ("sha256:SECRET\n", "line 1 of .*64 hexadecimal digits"),
        ("SECRET\xfc\n", "line 1 of .*ASCII"),
    ],
)
def test_what_is_no_key_is_named_by_its_line_and_never_shown(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=reason) as refused:
        ring(file)
    assert "SECRET" not in refused.value.message


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        ring(tmp_path / "missing")
