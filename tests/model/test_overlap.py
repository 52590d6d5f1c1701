"""The real model with a step in flight: every answer is the one of the same traffic, one step at a time."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from adapterd.core import Output, RequestId, SamplingParams
from adapterd.model.kv import kv_block_bytes
from tests.exactness.families import linear_names, save_adapter, save_model
from tests.offline import Offline, OfflineSettings

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
SEEDED = SamplingParams(max_tokens=12, temperature=0.9, seed=5)

RULES = [
    GREEDY,
    SEEDED,
    replace(SEEDED, top_p=0.8, min_p=0.02, max_tokens=7),
    replace(GREEDY, logprobs=2, max_tokens=6),
    replace(SEEDED, presence_penalty=0.7, repetition_penalty=1.2),
    replace(GREEDY, prompt_logprobs=1, logit_bias=((9, 4.0),)),
    replace(GREEDY, max_tokens=1),
    replace(SEEDED, top_k=20, logprobs=0, max_tokens=20),
]


@dataclass(frozen=True)
class Asked:
    """Comes before the step of this number, and is aborted before another."""

    step: int
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    num_sequences: int = 1
    aborted_before: int | None = None


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    save_model("llama", root / "base")
    names = linear_names(root / "base", "llama")
    for seed, name in enumerate("abc"):
        save_adapter(root / "base", root / name, rank=4, targets=names, seed=seed + 1)
    return root


def start(directory: Path, *, max_in_flight: int, **settings: int) -> Offline:
    offline = Offline(OfflineSettings(base=str(directory / "base"), max_num_batched_tokens=48, **settings))
    offline.runner.max_in_flight = max_in_flight
    for name in "abc":
        offline.load(name, directory / name)
    return offline


def tight(directory: Path) -> dict[str, int]:
    """Memory for some sequences and two adapters."""
    roomy = start(directory, max_in_flight=0)
    pages = max(roomy.runner.bank.pages_of(adapter) for adapter in roomy.adapters.values())
    return {
        "kv_memory": 9 * kv_block_bytes(roomy.base.kv_shapes, roomy.base.dtype),
        "adapter_memory": 2 * pages * roomy.runner.bank.page_bytes,
        "max_num_seqs": 6,
    }


def make_traffic() -> list[Asked]:
    """Three that fill the memory and outgrow it, then all kinds; when adapters arrive is up to their thread."""
    asked = [Asked(0, list(range(3 + i, 43 + i)), replace(GREEDY, max_tokens=20), None) for i in range(3)]
    for number in range(32):
        prompt = [(11 * number + 5 * i) % 150 + 3 for i in range(7 + 9 * (number % 4))]
        adapter = (None, "a", "b", None, "c")[number % 5]
        params = RULES[number % len(RULES)]
        aborted = number + 6 if number % 6 == 5 else None
        asked.append(Asked(number + 1, prompt, params, adapter, 1 + (number % 7 == 3), aborted))
    return asked


def run(offline: Offline, traffic: list[Asked]) -> dict[tuple[RequestId, int], list[Output]]:
    found: dict[tuple[RequestId, int], list[Output]] = {}
    ids: dict[int, RequestId] = {}
    step = 0
    while step < 60 or offline.engine.has_work():
        for number, asked in enumerate(traffic):
            if asked.step == step:
                adapters = {asked.adapter: 1.0} if asked.adapter else None
                ids[number] = offline.submit(asked.prompt, asked.params, adapters, asked.num_sequences)
            if asked.aborted_before == step:
                offline.engine.abort(ids[number])
        for output in offline.engine.step() if offline.engine.has_work() else ():
            found.setdefault((output.request_id, output.index), []).append(output)
        offline.engine.check_integrity()
        step += 1
    offline.run()
    return found


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def with_late_stops(traffic: list[Asked], found: dict[tuple[RequestId, int], list[Output]]) -> list[Asked]:
    """Every third answer stops at one of its own tokens, or at its text, in the middle."""
    stopping = []
    for number, asked in enumerate(traffic):
        tokens = tokens_of(found.get((RequestId(f"request-{number + 1}"), 0), []))
        params = asked.params
        if asked.step == 0:
            tokens = []
        if number % 3 == 0 and len(tokens) > 4:
            params = replace(params, stop_token_ids=(tokens[4],))
        if number % 3 == 1 and len(tokens) > 3:
            params = replace(params, stop=(f"<{tokens[2]}><{tokens[3]}",))
        stopping.append(replace(asked, params=params))
    return stopping


def test_answers_with_a_step_in_flight_are_those_without(directory: Path) -> None:
    memory = tight(directory)
    traffic = make_traffic()
    traffic = with_late_stops(traffic, run(start(directory, max_in_flight=0), traffic))
    plain = start(directory, max_in_flight=0, **memory)
    overlapped = start(directory, max_in_flight=1, **memory)
    expected, found = run(plain, traffic), run(overlapped, traffic)
    aborted = {RequestId(f"request-{i + 1}") for i, asked in enumerate(traffic) if asked.aborted_before}
    compared = [key for key in expected if key[0] not in aborted]
    assert len(compared) > 30
    for key in compared:
        wanted, got = expected[key], found[key]
        assert tokens_of(got) == tokens_of(wanted)
        assert "".join(o.text for o in got) == "".join(o.text for o in wanted)
        assert (got[-1].finish_reason, got[-1].stop_reason) == (
            wanted[-1].finish_reason,
            wanted[-1].stop_reason,
        )
        for own, other in zip(got, wanted, strict=True):
            entries = list(zip(own.logprobs, other.logprobs, strict=True))
            entries += zip(own.prompt_logprobs, other.prompt_logprobs, strict=True)
            for entry, reference in entries:
                assert entry.token_id == reference.token_id
                assert entry.logprob == pytest.approx(reference.logprob, abs=1e-4)
    reasons = {(outputs[-1].finish_reason, type(outputs[-1].stop_reason)) for outputs in expected.values()}
    assert {("stop", int), ("stop", str), ("length", type(None))} <= reasons
    for offline in (plain, overlapped):
        stats = offline.engine.stats()
        assert stats.num_preemptions > 0
        assert stats.num_evictions > 0
