"""Greedy in float32, every family gives PEFT's own tokens: mixed, chunked, preempted, from the prefix cache, swapped.

The reference runs one sequence and one adapter at a time through PEFT. Its top-two margin is asserted, so that a
tie is neither a pass nor a failure.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapterd.core import RequestId, SamplingParams
from adapterd.errors import ContextLengthExceeded
from adapterd.model.kernels import KernelName
from adapterd.model.kv import KV_BLOCK_SIZE, kv_block_bytes
from tests.exactness.families import FAMILIES, Continuation, Reference, linear_names, save_adapter, save_model
from tests.native_kernels import require_native_kernels
from tests.offline import Offline, OfflineSettings

NUM_TOKENS = 10
MIN_MARGIN = 1e-3
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
ROUTES = [None, "wide", "narrow", None, "odd", "wide"]
PROMPT_LENGTHS = [19, 33, 5, 26, 14, 9]


@dataclass(frozen=True)
class Case:
    """A model, adapters of different rank and targets, prompts, and what PEFT answers."""

    base: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: list[tuple[int, ...]]
    kernels: KernelName = "torch"


@pytest.fixture(params=["torch", "native"])
def case(request: pytest.FixtureRequest, family_case: Case) -> Case:
    if request.param == "native":
        require_native_kernels()
    return replace(family_case, kernels=request.param)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    root = tmp_path_factory.mktemp(family)
    base = root / "base"
    save_model(family, base)
    names = linear_names(base, family)
    adapters = {
        "wide": root / "wide",
        "narrow": root / "narrow",
        "odd": root / "odd",
        "wide2": root / "wide2",
    }
    save_adapter(base, adapters["wide"], rank=8, targets=names, seed=1)
    save_adapter(base, adapters["narrow"], rank=2, targets=names[:1], seed=2)
    save_adapter(base, adapters["odd"], rank=5, targets=names[-2:], seed=3, use_rslora=True)
    save_adapter(base, adapters["wide2"], rank=8, targets=names, seed=4)
    generator = torch.Generator().manual_seed(7)
    references = {route: Reference(base, adapters[route] if route else None) for route in set(ROUTES)}
    prompts, expected = [], []
    for length, route in zip(PROMPT_LENGTHS, ROUTES, strict=True):
        prompt, continuation = draw_prompt(references[route], length, generator)
        prompts.append(prompt)
        expected.append(continuation.token_ids)
    assert references["wide"].greedy(prompts[0], NUM_TOKENS).token_ids != expected[0], (
        "an adapter without effect"
    )
    return Case(base, adapters, prompts, expected)


def draw_prompt(
    reference: Reference, length: int, generator: torch.Generator
) -> tuple[list[int], Continuation]:
    """A random prompt on whose way the reference is nowhere near a tie."""
    for _ in range(20):
        prompt = torch.randint(0, 160, (length,), generator=generator).tolist()
        continuation = reference.greedy(prompt, NUM_TOKENS)
        if continuation.margin > MIN_MARGIN:
            return prompt, continuation
    raise AssertionError("the reference is always near a tie: the model says nothing")


def start(case: Case, **settings: int) -> Offline:
    offline = Offline(OfflineSettings(base=str(case.base), kernels=case.kernels, **settings))  # type: ignore[arg-type]
    for name in ("wide", "narrow", "odd"):
        offline.load(name, case.adapters[name])
    return offline


def submit_all(offline: Offline, case: Case) -> list[RequestId]:
    return [
        offline.submit(prompt, GREEDY, {route: 1.0} if route else None)
        for prompt, route in zip(case.prompts, ROUTES, strict=True)
    ]


def assert_exact(offline: Offline, case: Case, ids: list[RequestId]) -> None:
    finished = offline.run()
    assert [finished[request_id, 0].token_ids for request_id in ids] == case.expected


def test_mixed_batch_in_chunks_equals_peft(case: Case) -> None:
    offline = start(case, max_num_batched_tokens=16)
    assert_exact(offline, case, submit_all(offline, case))


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("family_case", ["llama"], indirect=True)
def test_threads_that_share_the_work_change_no_token(family_case: Case) -> None:
    require_native_kernels()
    offline = start(replace(family_case, kernels="native"))
    assert_exact(offline, family_case, submit_all(offline, family_case))


def test_preempted_and_recomputed_equals_peft(case: Case) -> None:
    num_blocks = 8  # of the 13 that all six would fill
    offline = start(case, max_num_batched_tokens=64)
    block_bytes = kv_block_bytes(offline.base.kv_shapes, offline.base.dtype)
    offline = start(case, max_num_batched_tokens=64, kv_memory=num_blocks * block_bytes)
    assert_exact(offline, case, submit_all(offline, case))
    assert offline.engine.stats().num_preemptions > 0


def test_prefix_hit_equals_peft(case: Case) -> None:
    offline = start(case)
    assert_exact(offline, case, submit_all(offline, case))
    assert offline.engine.stats().num_prefix_hit_tokens == 0
    assert_exact(offline, case, submit_all(offline, case))
    full_blocks = sum((length - 1) // KV_BLOCK_SIZE * KV_BLOCK_SIZE for length in PROMPT_LENGTHS)
    assert offline.engine.stats().num_prefix_hit_tokens == full_blocks


def test_prefix_of_the_same_step_equals_peft(case: Case) -> None:
    """Who starts beside its twin reads, layer by layer, what that one writes in the same step."""
    offline = start(case)
    ids = [ids for _ in range(2) for ids in submit_all(offline, case)]
    finished = offline.run()
    assert [finished[request_id, 0].token_ids for request_id in ids] == case.expected * 2
    full_blocks = sum((length - 1) // KV_BLOCK_SIZE * KV_BLOCK_SIZE for length in PROMPT_LENGTHS)
    assert offline.engine.stats().num_prefix_hit_tokens == full_blocks


def test_adapter_swapped_mid_run_equals_peft(case: Case) -> None:
    """A running answer ends on the version it began with; the next takes the new one; memory holds but one."""
    offline = start(case)
    pages = max(offline.runner.bank.pages_of(adapter) for adapter in offline.adapters.values())
    offline = start(case, adapter_memory=2 * pages * offline.runner.bank.page_bytes)
    prompt = case.prompts[1]
    new = Reference(case.base, case.adapters["wide2"]).greedy(prompt, NUM_TOKENS)
    assert new.margin > MIN_MARGIN
    before = offline.submit(prompt, GREEDY, {"wide": 1.0})
    outputs = [output for _ in range(4) for output in offline.engine.step()]
    old_version = offline.adapters["wide"].id
    offline.load("wide", case.adapters["wide2"])
    offline.engine.retire(old_version)
    after = offline.submit(prompt, GREEDY, {"wide": 1.0})
    others = [offline.submit(case.prompts[i], GREEDY, {ROUTES[i]: 1.0}) for i in (2, 4)]
    finished = offline.run()
    head = tuple(token for output in outputs for token in output.token_ids)
    assert head + finished[before, 0].token_ids == case.expected[1]
    assert finished[after, 0].token_ids == new.token_ids
    assert [finished[i, 0].token_ids for i in others] == [case.expected[2], case.expected[4]]
    assert offline.engine.stats().num_evictions > 0


def test_beyond_the_rope_switch_is_refused_by_name(tmp_path: Path) -> None:
    """LongRoPE picks its factors from the longest position of the whole batch, so the context ends at the switch."""
    save_model("phi3-longrope", tmp_path)
    offline = Offline(OfflineSettings(base=str(tmp_path)))
    assert offline.base.spec.max_model_len == 64
    with pytest.raises(ContextLengthExceeded, match="64 tokens"):
        offline.submit([1] * 60, GREEDY)
