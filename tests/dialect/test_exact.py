"""Greedy in float32, every kind of adapter gives PEFT's own tokens: mixed in one batch with plain ones and the base,
in chunks, preempted for want of KV blocks, swapped for want of adapter memory.

The reference runs one sequence and one adapter at a time through PEFT. Its top-two margin is asserted, so that a
tie is neither a pass nor a failure.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapterd.core import SamplingParams
from adapterd.model.kernels import KernelName
from adapterd.model.kv import kv_block_bytes
from tests.dialect.making import KINDS, save_base, save_peft
from tests.exactness.families import Continuation, Reference
from tests.native_kernels import require_native_kernels
from tests.offline import Offline, OfflineSettings

# PEFT's: of tied weights, of saved embeddings, of patterns that it then applies all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)

NUM_TOKENS = 8
MIN_MARGIN = 1e-3
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


@dataclass(frozen=True)
class Case:
    """A base, an adapter of each kind, prompts for each and for the base, and what PEFT answers."""

    base: Path
    adapters: dict[str, Path]
    prompts: dict[str | None, list[int]]
    expected: dict[str | None, tuple[int, ...]]
    kernels: KernelName = "torch"


@pytest.fixture(params=["torch", "native"])
def case(request: pytest.FixtureRequest, base_case: Case) -> Case:
    if request.param == "native":
        require_native_kernels()
    return replace(base_case, kernels=request.param)


@pytest.fixture(scope="module", params=sorted(KINDS))
def base_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("dialect")
    base = root / "base"
    save_base(request.param, base)
    plain = "c_attn" if request.param == "gpt2" else "qkv_proj" if request.param == "phi3" else "k_proj"
    adapters = {"plain": root / "plain"}
    save_peft(base, adapters["plain"], seed=1, target_modules=[plain], r=6)
    for seed, (kind, config) in enumerate(KINDS[request.param].items(), 2):
        adapters[kind] = root / kind.replace(" ", "-")
        save_peft(base, adapters[kind], seed=seed, **config)
    generator = torch.Generator().manual_seed(7)
    prompts: dict[str | None, list[int]] = {}
    expected: dict[str | None, tuple[int, ...]] = {}
    bare = Reference(base)
    for length, kind in enumerate([None, *adapters], 9):
        reference = bare if kind is None else Reference(base, adapters[kind])
        prompt, continuation = draw_prompt(reference, length, generator)
        prompts[kind], expected[kind] = prompt, continuation.token_ids
        if kind is not None:
            assert not torch.allclose(reference.logits(prompt), bare.logits(prompt), atol=0.05), kind
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
    for name, directory in case.adapters.items():
        offline.load(name, directory)
    return offline


def answers(offline: Offline, case: Case) -> dict[str | None, tuple[int, ...]]:
    ids = {
        kind: offline.submit(prompt, GREEDY, {kind: 1.0} if kind else None)
        for kind, prompt in case.prompts.items()
    }
    finished = offline.run()
    return {kind: finished[request_id, 0].token_ids for kind, request_id in ids.items()}


def test_every_kind_in_one_batch_in_chunks_equals_peft(case: Case) -> None:
    offline = start(case, max_num_batched_tokens=32, max_num_seqs=32)
    assert answers(offline, case) == case.expected
    assert offline.runner.num_steps_with_edits > 0 or case.base.parent.name.startswith("phi3")
    # Once more, from the prefix cache, with hooks and adapters in place.
    assert answers(offline, case) == case.expected


def test_every_kind_preempted_and_swapped_equals_peft(case: Case) -> None:
    offline = start(case)
    block_bytes = kv_block_bytes(offline.base.kv_shapes, offline.base.dtype)
    largest = max(offline.runner.bank.pages_of(adapter) for adapter in offline.adapters.values())
    offline = start(
        case,
        max_num_batched_tokens=64,
        kv_memory=3 * block_bytes,
        adapter_memory=(largest + 2) * offline.runner.bank.page_bytes,
    )
    # When adapters arrive decides how many sequences run beside each other, and so whether one is preempted.
    for _ in range(5):
        assert answers(offline, case) == case.expected
        stats = offline.engine.stats()
        assert stats.num_evictions > 0
        if stats.num_preemptions > 0 or len(case.prompts) < 6:
            return
    pytest.fail("never preempted")
