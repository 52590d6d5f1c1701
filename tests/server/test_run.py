"""Start and end: the port, the word that it is ready, and the way out at a signal."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapterd.errors import ConfigError
from adapterd.server.app import create_app
from adapterd.server.run import DrainingServer, bind, print_ready, url_of
from adapterd.server.state import ServerState
from tests.server.conftest import eventually
from tests.server.fakes import FakeDaemon, FakeEntry
from tests.serving import served

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@contextmanager
def draining(
    state: ServerState,
    *,
    drain_delay: float = 0,
    drain_timeout: float = 5,
    on_ready: Callable[[], None] = lambda: None,
) -> Iterator[tuple[DrainingServer, str, threading.Thread]]:
    listener = bind("127.0.0.1", 0)
    server = DrainingServer(
        create_app(state), state, drain_delay=drain_delay, drain_timeout=drain_timeout, on_ready=on_ready
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield server, url_of(listener), thread
    finally:
        server.should_exit = True
        thread.join()


class Streaming(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.text = ""
        self.start()

    def run(self) -> None:
        body = {**BODY, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=20) as response:
            for line in response.iter_lines():
                self.text += line + "\n"


def test_at_sigterm_running_requests_finish_and_new_ones_are_refused(
    state: ServerState, daemon: FakeDaemon
) -> None:
    daemon.engine.answer, daemon.engine.step_seconds = b"x" * 50, 0.02
    with draining(state) as (server, url, thread):
        client = Streaming(url)
        eventually(lambda: "x" in client.text)
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/livez").status_code == 200
        refused = httpx.post(f"{url}/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        client.join()
        assert client.text.endswith("data: [DONE]\n\n")
        assert client.text.count('"content":"x"') == 50
        thread.join(20)
        assert not thread.is_alive()
        assert server.exit_code == 0


def test_within_the_drain_delay_new_requests_are_served(state: ServerState, daemon: FakeDaemon) -> None:
    with draining(state, drain_delay=1.5) as (server, url, thread):
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz").status_code == 503
        served = httpx.post(f"{url}/v1/chat/completions", json=BODY)
        assert (served.status_code, served.headers["connection"]) == (200, "close")
        thread.join(20)
        assert not thread.is_alive()
        assert (server.exit_code, len(daemon.engine.requests)) == (0, 1)


def test_a_person_who_interrupts_waits_for_no_balancer(state: ServerState) -> None:
    with draining(state, drain_delay=60) as (server, _, thread):
        server.handle_exit(signal.SIGINT, None)
        thread.join(20)
        assert not thread.is_alive()
        assert server.exit_code == 0


def test_what_outlasts_the_drain_timeout_is_told_so(state: ServerState, daemon: FakeDaemon) -> None:
    daemon.engine.answer, daemon.engine.step_seconds = b"x" * 180, 0.1
    with draining(state, drain_timeout=0.2) as (server, url, thread):
        client = Streaming(url)
        eventually(lambda: "x" in client.text)
        server.handle_exit(signal.SIGTERM, None)
        client.join(20)
        last = json.loads(client.text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["message"] == "the server is shutting down"
        thread.join(20)
        assert not thread.is_alive()
        assert (server.exit_code, daemon.engine.running, daemon.registry.leases) == (0, {}, [])


def test_a_second_signal_ends_it_at_once(state: ServerState, daemon: FakeDaemon) -> None:
    daemon.engine.is_held = True
    with draining(state, drain_timeout=60) as (server, url, thread):
        client = Streaming(url)
        eventually(lambda: daemon.engine.running)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()
        client.join(20)


def test_it_leaves_with_a_failure_when_the_engine_fails(state: ServerState, daemon: FakeDaemon) -> None:
    with draining(state) as (server, _, thread):
        daemon.engine.fail("RuntimeError")
        thread.join(20)
        assert not thread.is_alive()
        assert server.exit_code == 1


def test_it_says_that_it_is_ready_once_and_only_when_the_adapters_are_read(
    state: ServerState, daemon: FakeDaemon
) -> None:
    daemon.registry.entries["slow"] = FakeEntry("slow", state="LOADING", id=None)
    said: list[list[str]] = []
    with draining(state, on_ready=lambda: said.append(state.model_names())):
        time.sleep(0.3)
        assert said == []
        daemon.registry.entries["slow"] = replace(daemon.registry.entries["support"], name="slow")
        eventually(lambda: said)
        time.sleep(0.3)
        assert said == [["tiny", "tiny:support", "tiny:slow"]]


def test_the_ready_line_has_the_url_the_models_and_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    print_ready("http://127.0.0.1:8000", ["mini", "mini:support"], asks_for_key=False)
    text = capsys.readouterr().out
    assert text.startswith("adapterd is ready on http://127.0.0.1:8000 with mini, mini:support.")
    command = text.splitlines()[1].strip()
    assert command.startswith("curl http://127.0.0.1:8000/v1/chat/completions ")
    assert json.loads(command.split("'")[-2])["model"] == "mini:support"
    assert "Authorization" not in command
    print_ready("http://127.0.0.1:8000", ["mini"], asks_for_key=True)
    assert " -H 'Authorization: Bearer KEY' -d '{" in capsys.readouterr().out


def test_a_port_in_use_is_one_clear_error() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*; choose another"):
            bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on no such host"):
        bind("no such host", 0)


def test_the_command_serves_and_leaves_at_sigterm_with_status_0(tiny_base: Path) -> None:
    adapters = tiny_base.parent / "adapters"
    arguments = ("--base", str(tiny_base), "--adapters", str(adapters), "--kv-memory", "4MiB")
    said: list[str] = []
    with served(*arguments, "--adapter-memory", "4MiB", said=said) as url:
        models = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
        assert models == ["tiny", "tiny:medical", "tiny:support"]
        body = {**BODY, "model": "tiny:support", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        rebound = {"host": "rebound.example"}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=rebound).status_code == 403
    (line,) = [line for line in said if "started in" in line]
    total, *seconds = map(float, re.findall(r"\d+\.\d\b", line.partition("started in")[2]))
    assert len(seconds) == 7, line
    assert total == pytest.approx(sum(seconds), abs=0.5)  # each is rounded to a tenth
