"""Adapters come, change and go under a running daemon: watched folders, over HTTP, with no restart."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import served

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "adapters"
TICKET = "I was charged twice for order 48213 and I am really angry. Please fix it today."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapters = tmp_path_factory.mktemp("hot") / "adapters"
    copy(SHIPPED / "moderation", adapters / "moderation")
    return adapters


@pytest.fixture(scope="module")
def client(directory: Path) -> Iterator[httpx.Client]:
    """One daemon for all: each test has names of its own."""
    with served("--adapters", str(directory)) as url, httpx.Client(base_url=url, timeout=60) as found:
        yield found


def copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapterd.json"):
        shutil.copy(source / name, target / name)


def ask(client: httpx.Client, model: str) -> httpx.Response:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": TICKET}],
        "temperature": 0,
        "max_tokens": 60,
    }
    return client.post("/v1/chat/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def point(link: Path, target: Path) -> None:
    """What a publisher does: one rename of a symbolic link."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def test_a_folder_that_appears_is_served_and_one_that_goes_is_not(
    client: httpx.Client, directory: Path
) -> None:
    assert ask(client, "mini:triage").status_code == 404
    staged = directory / ".triage.partial"
    copy(SHIPPED / "support", staged)
    staged.rename(directory / "triage")
    until(lambda: ask(client, "mini:triage").status_code == 200)
    assert text(ask(client, "mini:triage")).startswith("Category:")
    shutil.rmtree(directory / "triage")
    until(lambda: ask(client, "mini:triage").status_code == 404)
    assert "Category" not in text(ask(client, "mini:moderation"))


def test_a_running_answer_keeps_the_version_it_began_with(client: httpx.Client, directory: Path) -> None:
    versions = directory / ".versions" / "current"
    copy(SHIPPED / "support", versions / "one")
    copy(SHIPPED / "moderation", versions / "two")
    point(directory / "current", versions / "one")
    until(lambda: ask(client, "mini:current").status_code == 200)
    old = ask(client, "mini:current")
    body = {
        "model": "mini:current",
        "messages": [{"role": "user", "content": TICKET}],
        "temperature": 0,
        "max_tokens": 700,
        "ignore_eos": True,
    }
    whole = text(client.post("/v1/chat/completions", json=body))
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.headers["x-adapterd-digest"] == old.headers["x-adapterd-digest"]
        lines = response.iter_lines()
        streamed = [next(lines)]
        point(directory / "current", versions / "two")
        until(
            lambda: (
                ask(client, "mini:current").headers["x-adapterd-digest"] != old.headers["x-adapterd-digest"]
            )
        )
        streamed += lines
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole
    assert text(ask(client, "mini:current")) == text(ask(client, "mini:moderation"))


def test_a_folder_that_cannot_be_applied_is_refused_by_name_and_disturbs_nobody(
    client: httpx.Client, directory: Path
) -> None:
    broken = directory / "broken"
    copy(SHIPPED / "support", directory / ".broken")
    config = json.loads((directory / ".broken" / "adapter_config.json").read_text())
    (directory / ".broken" / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    (directory / ".broken" / "adapterd.json").unlink()
    (directory / ".broken").rename(broken)
    until(lambda: ask(client, "mini:broken").status_code == 400)
    error = ask(client, "mini:broken").json()["error"]
    assert error["code"] == "adapter_refused"
    assert "use_qalora" in error["message"]
    assert text(ask(client, "mini:moderation"))
    assert client.get("/readyz").status_code == 200
