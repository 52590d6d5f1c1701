"""Servers that the load generator starts itself."""

import time
from pathlib import Path

import psutil
import pytest

from bench.daemon import free_port
from bench.target import Target, resident_bytes, running, server_version


def test_a_server_is_started_watched_and_stopped(tmp_path: Path) -> None:
    port = free_port()
    target = Target(
        url=f"http://127.0.0.1:{port}",
        start=f'"$PYTHON" -m http.server {port} --bind 127.0.0.1 --directory {tmp_path}',
        ready="/",
    )
    before = set(psutil.Process().children())
    with running(target, timeout_seconds=60) as server:
        (process,) = set(psutil.Process().children()) - before
        assert server.startup_seconds is not None
        assert 0 < server.startup_seconds < 60
        deadline = time.monotonic() + 30
        while server.memory.peak_rss_bytes is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.memory.peak_rss_bytes is not None
        assert server.memory.peak_rss_bytes > 1e6
        with pytest.raises(RuntimeError, match="already answers"), running(target, timeout_seconds=1):
            pass
    assert not process.is_running()


def test_a_server_that_does_not_start_shows_its_log() -> None:
    target = Target(
        url=f"http://127.0.0.1:{free_port()}", start='"$PYTHON" -c "raise SystemExit(\'no such model\')"'
    )
    with pytest.raises(RuntimeError, match="no such model"), running(target, timeout_seconds=60):
        pass


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    target = Target(url=f"http://127.0.0.1:{free_port()}", start="sleep 60")
    before = set(psutil.Process().children())
    with pytest.raises(RuntimeError, match="did not answer 200 within"), running(target, timeout_seconds=0.5):
        pass
    assert set(psutil.Process().children()) == before


def test_a_process_that_is_gone_takes_no_memory() -> None:
    process = psutil.Popen(["true"])
    process.wait()
    assert resident_bytes(process.pid) == 0
    assert resident_bytes(psutil.Process().pid) > 1e6


@pytest.mark.parametrize(
    ("command", "version"), [("echo server-$NUMBER.tar.gz", "server-1.2.tar.gz"), ("echo half; false", None)]
)
def test_a_server_without_a_version_endpoint_is_asked_by_its_command(
    command: str, version: str | None
) -> None:
    assert server_version(Target(version=command, env={"NUMBER": "1.2"})) == version
