"""Routers read our /metrics: in each state of a real daemon, the pod that holds an adapter is the one they choose."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from adapterd.config import ServeSettings
from adapterd.daemon import Daemon
from adapterd.server.app import create_app
from adapterd.server.state import ServerState
from tests.contract.router import Pod, Unreadable, lora_affinity, lora_load_state, read
from tests.server.conftest import listening


@contextmanager
def pod(tiny_base: Path, **settings: object) -> Iterator[str]:
    """A daemon on the tiny base that runs one sequence at a time."""
    serve = ServeSettings(
        base=str(tiny_base),
        adapters=(tiny_base.parent / "adapters",),
        kv_memory=2**22,
        **{"adapter_memory": 2**22, "max_num_seqs": 1, **settings},
    )
    daemon = Daemon.build(serve)
    with listening(create_app(ServerState(daemon))) as url:
        assert daemon.registry.wait_loaded(30)
        yield url


def poll(url: str, page: str = "/metrics/router") -> Pod:
    """As the picker does it: no key, no Accept header."""
    request = httpx.Request("GET", f"{url}{page}", headers={})
    with httpx.Client() as client:
        response = client.send(request)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read(response.text)


def poll_until(url: str, holds: Callable[[Pod], object]) -> Pod:
    """The first poll of which it holds."""
    deadline = time.monotonic() + 20
    while not holds(seen := poll(url)):
        assert time.monotonic() < deadline, f"it did not come about: {seen}"
        time.sleep(0.02)
    return seen


def ask(url: str, model: str, max_tokens: int = 1) -> None:
    body = {"model": model, "prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


@contextmanager
def busy(url: str, *models: str) -> Iterator[None]:
    """Clients that ask each of these models for long answers again and again, in this order."""
    done = threading.Event()

    def keep_asking(model: str) -> None:
        while not done.is_set():
            ask(url, model, 200)

    threads = []
    for number, model in enumerate(models, start=1):
        threads.append(threading.Thread(target=keep_asking, args=(model,)))
        threads[-1].start()
        poll_until(url, lambda seen, number=number: seen.num_running + seen.num_waiting >= number)
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def url(tiny_base: Path) -> Iterator[str]:
    with pod(tiny_base) as url:
        yield url


@pytest.mark.parametrize("page", ["/metrics", "/metrics/router"])
def test_idle_and_empty_from_the_first_scrape_on(tiny_base: Path, page: str) -> None:
    with pod(tiny_base) as url:
        seen = poll(url, page)
    assert (seen.num_waiting, seen.num_running, seen.kv_usage) == (0, 0, 0.0)
    assert (seen.block_size, seen.base, seen.active, seen.waiting) == (16, "tiny", set(), set())
    assert seen.num_blocks > 0
    assert seen.max_active >= 4, "both adapters fit, each under two names"
    assert lora_affinity(seen, "tiny:support") == 0.8
    assert seen.load_seconds > 0
    assert seen.activate_seconds == 0


@pytest.mark.parametrize("model", ["tiny:support", "support"])
def test_a_resident_idle_adapter_scores_highest_under_either_name(url: str, model: str) -> None:
    ask(url, "tiny:support")
    seen = poll_until(url, lambda seen: seen.num_running == 0)
    assert (lora_affinity(seen, model), lora_load_state(seen, model)) == (1.0, 1.0)
    assert lora_affinity(seen, "tiny:nobody") == 0.8
    assert seen.activate_seconds > 0


def test_what_is_in_host_memory_alone_comes_second(tiny_base: Path) -> None:
    with pod(tiny_base) as url:
        ask(url, "tiny:support")
        seen = poll(url)
    assert lora_load_state(seen, "tiny:support") > lora_load_state(seen, "tiny:medical")
    assert lora_load_state(seen, "tiny:medical") > lora_load_state(seen, "tiny:nobody")


def test_a_queue_is_counted_and_shadows_no_residency(url: str) -> None:
    ask(url, "tiny:support")
    with busy(url, "tiny", "tiny", "tiny"):
        seen = poll_until(url, lambda seen: seen.num_waiting)
    assert seen.num_running + seen.num_waiting <= 3
    assert 0 < seen.kv_usage <= 1
    assert lora_affinity(seen, "tiny:support") == 1.0


def test_over_capacity_only_what_is_here_or_on_its_way_scores(tiny_base: Path, url: str) -> None:
    """Memory for one adapter: the one that runs keeps it, another waits, a third has no business here."""
    ask(url, "tiny:medical")
    enough = largest_bank_bytes(url, "medical")
    with (
        pod(tiny_base, adapter_memory=enough, max_num_seqs=2) as small,
        busy(small, "tiny:medical", "tiny:support"),
    ):
        seen = poll_until(
            small, lambda seen: "tiny:medical" in seen.active and "tiny:support" in seen.waiting
        )
    assert [lora_affinity(seen, f"tiny:{name}") for name in ("medical", "support", "nobody")] == [
        1.0,
        0.6,
        0.0,
    ]
    assert lora_load_state(seen, "tiny:nobody") == 0.0
    assert lora_load_state(seen, "tiny") == 0.0


def largest_bank_bytes(url: str, adapter: str) -> int:
    prefix = f'adapterd_adapter_bank_bytes{{adapter="{adapter}"}} '
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(prefix)]
    return int(float(lines[0].removeprefix(prefix)))


def test_the_reader_itself_wants_what_the_picker_wants() -> None:
    with pytest.raises(Unreadable, match="num_requests_waiting"):
        read('vllm:cache_config_info{block_size="16",num_gpu_blocks="1"} 1\n')
