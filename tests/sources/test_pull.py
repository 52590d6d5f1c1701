"""`adapterd pull`, as an init container or a sidecar runs it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapterd.cli import EXIT_ERROR, EXIT_USAGE, main
from adapterd.config import PullSettings
from adapterd.errors import ConfigError, InvalidRequest
from adapterd.sources.pull import Pulled, Puller
from adapterd.training.publish import check_target, publish
from tests.sources.servers import Asked, Reply, web_server


def files(weights: bytes) -> Mapping[str, bytes]:
    return {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}


def sha256(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()


@pytest.fixture
def web() -> Iterator[Asked]:
    with web_server() as asked:
        yield asked


def declared(web: Asked, folder: str, weights: bytes) -> str:
    web.put(folder, files(weights))
    return f"{web.url}/{folder}#sha256={sha256(weights)}"


def puller(into: Path, *sources: str, **settings: Any) -> Puller:
    return Puller(PullSettings(sources=sources, into=into, **settings))


def weights(into: Path, name: str) -> bytes:
    return (into / name / "adapter_model.safetensors").read_bytes()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def test_each_adapter_is_published_by_a_relative_link(web: Asked, tmp_path: Path) -> None:
    into = tmp_path / "adapters"
    pulled = puller(into, f"a={declared(web, 'x', b'one')}", declared(web, "b", b"two")).pull()
    assert [(one.name, one.is_new, one.error) for one in pulled] == [("a", True, None), ("b", True, None)]
    assert (weights(into, "a"), weights(into, "b")) == (b"one", b"two")
    assert os.readlink(into / "a") == f".versions/a/{pulled[0].digest}"
    into.rename(tmp_path / "mounted elsewhere")
    assert weights(tmp_path / "mounted elsewhere", "a") == b"one"


def test_what_is_there_is_not_fetched_again(web: Asked, tmp_path: Path) -> None:
    source = declared(web, "a", b"one")
    puller(tmp_path, source).pull()
    web.paths.clear()
    assert [one.is_new for one in puller(tmp_path, source).pull()] == [False]
    assert web.paths == []
    # Unless what was published has gone.
    (tmp_path / "a").unlink()
    assert [one.is_new for one in puller(tmp_path, source).pull()] == [True]


def test_a_failure_leaves_what_was_there_and_the_others(web: Asked, tmp_path: Path) -> None:
    puller(tmp_path, declared(web, "a", b"one")).pull()
    bad = f"{web.url}/a#sha256={sha256(b'another')}"
    first, second = puller(tmp_path, bad, declared(web, "b", b"two")).pull()
    assert "was declared" in (first.error or "")
    assert second.error is None
    assert (weights(tmp_path, "a"), weights(tmp_path, "b")) == (b"one", b"two")
    assert list((tmp_path / ".versions" / ".partial").iterdir()) == []


def test_a_directory_of_somebody_elses_is_left_alone(web: Asked, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (only,) = puller(tmp_path, declared(web, "a", b"one")).pull()
    assert "was not published by adapterd" in (only.error or "")
    assert list((tmp_path / "a").iterdir()) == []


def test_old_versions_stay_for_a_while(web: Asked, tmp_path: Path) -> None:
    digests = []
    for number in range(5):
        (one,) = puller(tmp_path, declared(web, "a", b"%d" % number), keep=2).pull()
        digests.append(one.digest)
        os.utime(tmp_path / ".versions" / "a" / str(one.digest), (number, number))
    kept = {path.name for path in (tmp_path / ".versions" / "a").iterdir() if path.is_dir()}
    assert kept == set(digests[-2:])


def test_a_manifest_is_followed_and_what_it_no_longer_names_is_withdrawn(web: Asked, tmp_path: Path) -> None:
    manifest, into = tmp_path / "adapters.yaml", tmp_path / "into"

    def say(**sources: str) -> None:
        entries = "".join(f"  {name}: {{source: '{source}'}}\n" for name, source in sources.items())
        manifest.write_text(f"version: 1\nadapters:\n{entries}" if entries else "version: 1\nadapters: {}\n")

    reports: list[Pulled] = []
    say(a=declared(web, "a", b"one"), b=declared(web, "b", b"two"))
    stop = threading.Event()
    watcher = puller(into, manifest=manifest, watch=True, interval=0.1)
    thread = threading.Thread(target=watcher.watch, args=(stop, reports.extend))
    thread.start()
    try:
        until(lambda: len(reports) == 2)
        say(a=declared(web, "a2", b"three"))
        until(lambda: not (into / "b").exists() and weights(into, "a") == b"three")
        manifest.write_text("version: 2")
        time.sleep(0.3)
        assert weights(into, "a") == b"three"
        say()
        until(lambda: not (into / "a").exists())
    finally:
        stop.set()
        thread.join()
    assert {path.name for path in (into / ".versions").iterdir()} <= {".partial"}


def train_into(into: Path, name: str, data: bytes) -> None:
    """As `adapterd train --out` publishes."""
    staged = into.with_name(f"staged-{name}")
    staged.mkdir(parents=True)
    for file, content in files(data).items():
        (staged / file).write_bytes(content)
    into.mkdir(exist_ok=True)
    publish(staged, into / name, digest=sha256(data), in_place=False)


def test_what_was_trained_there_is_neither_withdrawn_nor_pulled_over(web: Asked, tmp_path: Path) -> None:
    manifest, into = tmp_path / "adapters.yaml", tmp_path / "into"
    for number in range(3):
        train_into(into, "trained", b"%d" % number)
    source = declared(web, "a", b"one")
    manifest.write_text(f"version: 1\nadapters:\n  a: {{source: '{source}'}}\n")
    (only,) = puller(into, manifest=manifest).pull()
    assert (only.name, only.is_new, only.error) == ("a", True, None)
    (only,) = puller(into, f"trained={source}", keep=1).pull()
    assert "was not published by adapterd pull" in (only.error or "")
    assert weights(into, "trained") == b"2"
    assert len(list((into / ".versions" / "trained").iterdir())) == 3
    # Nor are its versions taken over where nothing leads to one of them.
    (into / "trained").unlink()
    (only,) = puller(into, f"trained={source}", keep=1).pull()
    assert "was not published by adapterd pull" in (only.error or "")
    assert len(list((into / ".versions" / "trained").iterdir())) == 3


def test_train_refuses_a_name_that_is_pulled(web: Asked, tmp_path: Path) -> None:
    puller(tmp_path, declared(web, "a", b"one")).pull()
    with pytest.raises(InvalidRequest, match="belongs to adapterd pull"):
        check_target(tmp_path / "a", in_place=False)
    check_target(tmp_path / "b", in_place=False)


def test_what_a_pull_of_before_published_is_still_pulls_own(web: Asked, tmp_path: Path) -> None:
    """The layout as it has always been: link, versions, and a note beside them."""
    manifest, into = tmp_path / "adapters.yaml", tmp_path / "into"
    for name in ("kept", "gone"):
        version = into / ".versions" / name / ("d" * 64)
        version.mkdir(parents=True)
        note = {"source": "https://host/x", "sha256": None, "state": None, "digest": "d" * 64}
        (version.parent / "pulled.json").write_text(json.dumps(note))
        (into / name).symlink_to(f".versions/{name}/{'d' * 64}")
    manifest.write_text(f"version: 1\nadapters:\n  kept: {{source: '{declared(web, 'a', b'one')}'}}\n")
    (only,) = puller(into, manifest=manifest).pull()
    assert (only.name, only.is_new, only.error) == ("kept", True, None)
    assert weights(into, "kept") == b"one"
    assert not os.path.lexists(into / "gone")
    assert not (into / ".versions" / "gone").exists()


def test_a_pull_or_withdrawal_that_was_killed_half_way_is_finished_later(web: Asked, tmp_path: Path) -> None:
    manifest = tmp_path / "adapters.yaml"
    source = declared(web, "a", b"one")
    puller(tmp_path, source).pull()
    (tmp_path / "a").unlink()  # as far as either may have come: there are versions, and no link to one
    assert [(one.is_new, one.error) for one in puller(tmp_path, source).pull()] == [(True, None)]
    (tmp_path / "a").unlink()
    manifest.write_text("version: 1\nadapters: {}\n")
    assert puller(tmp_path, manifest=manifest).pull() == []
    assert not (tmp_path / ".versions" / "a").exists()


def test_a_directory_of_this_machine_is_copied(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    for name, data in {**files(b"one"), "README.md": b"#"}.items():
        (tmp_path / "image" / name).write_bytes(data)
    puller(tmp_path / "into", f"a={tmp_path / 'image'}").pull()
    assert {path.name for path in (tmp_path / "into" / "a").iterdir()} == set(files(b""))


def test_an_operators_patterns_hold_for_a_pull(web: Asked, tmp_path: Path) -> None:
    (only,) = puller(tmp_path, declared(web, "a", b"one"), allow_source=("hf://acme/*",)).pull()
    assert "is not allowed" in (only.error or "")
    assert web.paths == []


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ((), "nothing to pull"),
        (("hf://acme",), "hf://OWNER/NAME"),
        (("a=hf://x/y", "a=hf://x/z"), "two sources are called 'a'"),
        (("https://host/_",), "is no name of an adapter"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    sources: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        puller(tmp_path, *sources)


def test_a_sidecar_leaves_at_sigterm_in_the_middle_of_a_download(web: Asked, tmp_path: Path) -> None:
    source = declared(web, "a", b"one")
    web.replies["/a/adapter_model.safetensors"] = Reply(b"one", delay_seconds=30.0)
    command = [sys.executable, "-m", "adapterd", "pull", source, "--into", str(tmp_path), "--watch"]
    process = subprocess.Popen(command)
    until(lambda: "GET /a/adapter_model.safetensors" in web.paths)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    web.stop.set()
    assert [path for path in (tmp_path / ".versions").rglob("*") if path.is_file()] == []


def test_the_command_says_what_it_did(
    web: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTERD_CONFIG", raising=False)
    source = declared(web, "a", b"one")
    into = ["--into", str(tmp_path)]
    assert main(["pull", source, *into]) == 0
    assert capsys.readouterr().out.split()[::2] == ["a", "new"]
    web.replies["/a/adapter_model.safetensors"] = Reply(status=500)
    assert main(["pull", source, f"b={web.url}/b#sha256={sha256(b'')}", *into]) == EXIT_ERROR
    output = capsys.readouterr()
    assert main(["pull", f"b={web.url}/b#sha256={sha256(b'')}", *into, "--tolerate-errors"]) == 0
    assert capsys.readouterr().err.startswith("adapterd: the source")
    assert output.out.split()[::2] == ["a", "unchanged"]
    assert output.err.startswith("adapterd: the source")
    assert main(["pull", *into]) == EXIT_USAGE
