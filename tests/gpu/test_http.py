"""The daemon on a CUDA device, in a process of its own, over HTTP: PEFT's tokens, and adapters that come and go."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapterd.model.find import find_base
from tests.exactness.families import Reference
from tests.serving import served

DEVICE = "cuda"
_SERVER_NEEDS = ("starlette", "uvicorn", "pydantic", "httptools", "httpx2")
_MISSING = [package for package in _SERVER_NEEDS if find_spec(package) is None]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(_MISSING), reason=f"the server needs {', '.join(_MISSING)}"),
]

SHIPPED = Path(__file__).resolve().parents[2] / "adapters"
ROUTES = [None, "support", "moderation", "medical"]
NUM_TOKENS = 16
QUESTIONS = [
    "I was charged twice for order 48213. Please fix it today.",
    "My parcel has not arrived.",
]
# Few sequences at once are few sizes of graphs, and few kernels to compile before the daemon is ready.
SERVED = ("--device", DEVICE, "--max-num-seqs", "4", "--kv-memory", "64MiB", "--adapter-memory", "64MiB")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that the daemon is told of later: one/ is shipped as support, two/ as medical."""
    root = tmp_path_factory.mktemp("fresh")
    for name, shipped in (("one", "support"), ("two", "medical")):
        (root / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors", "adapterd.json"):
            shutil.copy(SHIPPED / shipped / file, root / name / file)
    return root


@pytest.fixture(scope="module")
def client(fresh: Path) -> Iterator[httpx.Client]:
    runtime = ("--allow-runtime-adapters", "--allow-source", str(fresh), "--adapters", str(SHIPPED))
    with (
        served(*SERVED, "--dtype", "float32", *runtime) as url,
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=32)) as found,
    ):
        wait_until_loaded(found)
        yield found


def wait_until_loaded(client: httpx.Client) -> None:
    """Adapters are read in the background; the daemon is ready before."""
    deadline = time.monotonic() + 60
    while not all(ask(client, route, QUESTIONS[0]).status_code == 200 for route in ROUTES):
        assert time.monotonic() < deadline, "the shipped adapters are not served"
        time.sleep(0.2)


def body(route: str | None, question: str, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    return {
        "model": f"mini:{route}" if route else "mini",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def ask(client: httpx.Client, route: str | None, question: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body(route, question))


def tokens(response: httpx.Response) -> tuple[int, ...]:
    assert response.status_code == 200, response.text
    return tuple(response.json()["choices"][0]["token_ids"])


@cache
def expected(shipped: str | None, question: str) -> tuple[int, ...]:
    """What PEFT says in float32, one sequence at a time, on the CPU."""
    from adapterd.render import Renderer

    base = find_base("mini")
    prompt = Renderer.load(base).render([{"role": "user", "content": question}])
    found = Reference(base, SHIPPED / shipped if shipped else None).greedy(prompt, NUM_TOKENS)
    assert found.margin > 1e-3, "choose another question: the reference is near a tie"
    return found.token_ids


def test_mixed_chats_at_once_are_pefts_own(client: httpx.Client) -> None:
    asked = [(route, question) for question in QUESTIONS for route in ROUTES] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: ask(client, *each), asked))
    for (route, question), answer in zip(asked, answers, strict=True):
        assert tokens(answer) == expected(route, question)
    assert len({tokens(answer) for answer in answers}) == len(QUESTIONS) * len(
        ROUTES
    )  # adapters do something


@dataclass
class Traffic:
    """Clients that ask without end and know what the answer must be."""

    client: httpx.Client
    num_right: int = 0
    wrong: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Traffic":
        for route in (None, "support", "moderation"):
            thread = threading.Thread(target=self._ask, args=(route, expected(route, QUESTIONS[0])))
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, route: str | None, right: tuple[int, ...]) -> None:
        while not self._end.is_set():
            answer = ask(self.client, route, QUESTIONS[0])
            if answer.status_code == 200 and tokens(answer) == right:
                self.num_right += 1
            else:
                self.wrong.append(answer.text)


def load(client: httpx.Client, path: Path, **more: bool) -> None:
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "fresh", "lora_path": str(path), **more})
    assert answer.status_code == 200, answer.text


def test_adapter_is_loaded_swapped_and_unloaded_under_traffic(client: httpx.Client, fresh: Path) -> None:
    assert ask(client, "fresh", QUESTIONS[0]).status_code == 404
    with Traffic(client) as traffic:
        load(client, fresh / "one")
        assert tokens(ask(client, "fresh", QUESTIONS[0])) == expected("support", QUESTIONS[0])
        whole = tokens(client.post("/v1/chat/completions", json=body("fresh", QUESTIONS[1], 500)))
        running = {**body("fresh", QUESTIONS[1], 500), "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=running) as response:
            lines = response.iter_lines()
            streamed = [next(lines)]
            load(client, fresh / "two", load_inplace=True)
            assert tokens(ask(client, "fresh", QUESTIONS[0])) == expected("medical", QUESTIONS[0])
            streamed += lines
        # What ran while the version changed kept its own.
        assert streamed_tokens(streamed) == whole
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}).status_code == 200
        assert ask(client, "fresh", QUESTIONS[0]).status_code == 404
    assert traffic.wrong == []
    assert traffic.num_right > 3
    assert client.get("/readyz").status_code == 200


def streamed_tokens(lines: list[str]) -> tuple[int, ...]:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return tuple(token for choice in choices for token in choice.get("token_ids") or ())


def test_metrics_count_what_was_served(client: httpx.Client) -> None:
    def counted() -> tuple[float, float]:
        lines = client.get("/metrics").text.splitlines()
        values = [line.rpartition(" ") for line in lines if not line.startswith("#")]

        def total(name: str) -> float:
            return sum(float(value) for series, _, value in values if series.split("{")[0] == name)

        return total("adapterd_output_tokens_total"), total("adapterd_steps_total")

    tokens_before, steps_before = counted()
    tokens(ask(client, "support", QUESTIONS[1]))
    tokens_after, steps_after = counted()
    assert tokens_after - tokens_before == NUM_TOKENS
    assert steps_after - steps_before >= NUM_TOKENS


def test_base_in_its_own_type_answers_to_the_end_after_sigterm() -> None:
    """bfloat16, as the checkpoint is: what runs when the signal comes is answered whole, and the exit status is 0."""
    finished: list[tuple[int, ...]] = []
    began = threading.Event()

    def stream(url: str) -> None:
        request = {**body("support", QUESTIONS[0], 600), "stream": True}
        lines = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                began.set()
        finished.append(streamed_tokens(lines))

    with served(*SERVED, "--adapters", str(SHIPPED)) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until_loaded(client)
            text = ask(client, "support", QUESTIONS[0]).json()["choices"][0]["message"]["content"]
            assert text.startswith("Category:")
        thread = threading.Thread(target=stream, args=(url,))
        thread.start()
        assert began.wait(30)
    thread.join(30)
    assert [len(answer) for answer in finished] == [600]
