"""A step in flight on a CUDA device: the same answers, and a launch that waits for nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterd.core import RequestId, SamplingParams
from adapterd.engine.offline import Finished
from tests.exactness.families import linear_names, save_adapter, save_model
from tests.offline import Offline, OfflineSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
SEEDED = SamplingParams(max_tokens=24, temperature=0.9, seed=5)
RULES = [
    GREEDY,
    SEEDED,
    replace(SEEDED, top_p=0.8, min_p=0.02, max_tokens=9),
    replace(GREEDY, logprobs=2, logit_bias=((9, 4.0),)),
    replace(SEEDED, top_k=20, logprobs=0),
    replace(GREEDY, min_tokens=3, stop_token_ids=(9, 10, 11)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    save_model("llama", root / "base")
    names = linear_names(root / "base", "llama")
    for seed, name in enumerate("ab"):
        save_adapter(root / "base", root / name, rank=4, targets=names, seed=seed + 1)
    return root


def start(directory: Path, max_in_flight: int) -> Offline:
    settings = OfflineSettings(base=str(directory / "base"), device="cuda", max_num_batched_tokens=64)
    offline = Offline(settings)
    assert offline.runner.max_in_flight == 1
    offline.runner.max_in_flight = max_in_flight
    for name in "ab":
        offline.load(name, directory / name)
    offline.bring("a", "b")
    return offline


def submit_all(offline: Offline, rules: list[SamplingParams]) -> list[RequestId]:
    return [
        offline.submit(
            [(11 * i + 5 * k) % 150 + 3 for k in range(5 + 7 * i)],
            params,
            (None, {"a": 1.0}, {"b": 1.0})[i % 3],
        )
        for i, params in enumerate(rules)
    ]


def test_answers_with_a_step_in_flight_are_those_without(directory: Path) -> None:
    """Stops, penalties and all, some of them in replayed graphs and some beside prompts."""
    rules = [*RULES, replace(SEEDED, presence_penalty=0.7, max_tokens=8), *RULES]
    found: list[list[Finished]] = []
    for max_in_flight in (0, 1):
        offline = start(directory, max_in_flight)
        ids = submit_all(offline, rules)
        finished = offline.run()
        found.append([finished[request_id, 0] for request_id in ids])
    for plain, overlapped in zip(*found, strict=True):
        assert overlapped.token_ids == plain.token_ids
        assert overlapped.finish_reason == plain.finish_reason
        expected = [entry.logprob for entry in plain.logprobs]
        assert [entry.logprob for entry in overlapped.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rule", range(len(RULES)))
def test_decode_steps_are_launched_without_waiting_for_the_device(directory: Path, rule: int) -> None:
    """torch raises on whatever waits, but for events, by which alone results are read."""
    offline = start(directory, 1)
    submit_all(offline, [replace(RULES[rule], min_tokens=20, max_tokens=24)] * 4)
    for _ in range(6):
        offline.engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            assert len(offline.engine.step()) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
    offline.run()


def test_adapters_wait_in_pinned_memory_and_arrive_whole(directory: Path) -> None:
    offline = start(directory, 1)
    for adapter in offline.adapters.values():
        products = offline.runner.bank.products(((adapter.id, 1.0),))
        for matrices in adapter.modules:
            assert matrices.a.is_pinned()
            assert matrices.b.is_pinned()
            a, b_t = (
                torch.cat([getattr(part, name) for part in products[matrices.module]]).cpu()
                for name in ("a", "b_t")
            )
            assert torch.equal(a, matrices.a)
            assert torch.equal(b_t, matrices.b.T)
