"""`adapterd adapters ...` against a daemon in a process of its own, as a person uses it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterd.cli import EXIT_ERROR, EXIT_USAGE, main
from tests.serving import served

SHIPPED = Path(__file__).resolve().parent.parent / "adapters"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "keys").write_text("# two of them\nsecret role=admin\nclient\n")
    manifest = folder / "adapters.yaml"
    manifest.write_text(f"version: 1\nadapters: {{owned: {{source: {SHIPPED / 'support'}}}}}\n")
    arguments = [
        "--allow-runtime-adapters",
        "--api-key-file",
        str(folder / "keys"),
        "--manifest",
        str(manifest),
    ]
    with served(*arguments, "--allow-source", str(SHIPPED)) as url:
        yield url


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERD_CONFIG", raising=False)
    monkeypatch.setenv("ADAPTERD_API_KEY", "secret")


def run(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> str:
    status = main(["adapters", *arguments, "--url", url])
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out


def test_an_adapters_life_from_a_terminal(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, url, "load", "a", str(SHIPPED / "support"), "--pin").startswith("a is version 1, ")
    assert "version 2" in run(capsys, url, "update", "a", str(SHIPPED / "moderation"))
    assert "aliases: stable = 1" in run(capsys, url, "alias", "a", "stable", "1")
    assert "version 1" in run(capsys, url, "rollback", "a")
    assert "pinned" not in run(capsys, url, "unpin", "a")
    assert "pinned" in run(capsys, url, "pin", "a")
    assert "device memory" in run(capsys, url, "prefetch", "a")
    table = run(capsys, url, "ls").splitlines()
    assert table[0].split()[:3] == ["NAME", "VERSION", "STATE"]
    assert [line.split()[0] for line in table[1:]] == ["a", "owned"]
    assert table[2].split()[-2:] == ["manifest", str(SHIPPED / "support")]
    shown = run(capsys, url, "show", "a")
    assert "stable" in shown
    assert "exact: " in shown
    assert "1*" in shown
    card = json.loads(run(capsys, url, "show", "a", "--json"))
    assert (card["version"], card["aliases"]) == (1, {"stable": 1})
    assert "aliases" not in run(capsys, url, "unalias", "a", "stable")
    assert "host" in run(capsys, url, "unload", "a", "--deadline", "5")
    run(capsys, url, "load", "a", str(SHIPPED / "support"))
    assert run(capsys, url, "delete", "a", "--abort").startswith("a is unloaded: ")
    assert [line.split()[0] for line in run(capsys, url, "ls").splitlines()[1:]] == ["owned"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["show", "nobody"], "does not exist"),
        (["load", "b", "hf://acme/b"], "is not allowed"),
        (["load", "b", "/etc"], "is no folder below"),
        (["pin", "owned"], "is owned by the manifest"),
        (["unload", "a/b"], "Unknown request URL"),
    ],
)
def test_a_refusal_is_one_line_in_the_daemons_words(
    arguments: list[str], line: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", *arguments, "--url", url]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_key_is_needed_where_the_daemon_asks_for_one(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTERD_API_KEY")
    assert main(["adapters", "ls", "--url", url]) == EXIT_ERROR
    assert "API key" in capsys.readouterr().err
    (tmp_path / "key").write_text("# mine\nsha256:00\nsecret role=admin\n")
    assert main(["adapters", "ls", "--url", url, "--api-key-file", str(tmp_path / "key")]) == 0
    assert main(["adapters", "ls", "--api-key-file", str(tmp_path / "nowhere")]) == EXIT_USAGE
    monkeypatch.setenv("ADAPTERD_API_KEY", "client")
    capsys.readouterr()
    assert main(["adapters", "ls", "--url", url]) == 0
    assert main(["adapters", "pin", "owned", "--url", url]) == EXIT_ERROR
    assert "admin" in capsys.readouterr().err


def test_a_daemon_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9", "nonsense", "http://[", "ftp://x"):
        assert main(["adapters", "ls", "--url", url]) in (EXIT_ERROR, EXIT_USAGE)
        assert capsys.readouterr().err.count("\n") == 1


def test_the_commands_import_no_torch() -> None:
    modules = "adapterd.cli, adapterd.adapter_commands, adapterd.daemon_client, adapterd.sources.pull"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
