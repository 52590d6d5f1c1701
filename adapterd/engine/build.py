"""An engine over a loaded base, and running it by hand: the part of the daemon that needs no names and no text."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId, AdapterMix, FinishReason, Output, RequestId, TokenLogprobs
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine
from adapterd.engine.scheduler import SchedulerLimits
from adapterd.engine.seams import EngineMemory
from adapterd.errors import AdapterRefused
from adapterd.model.base import Base
from adapterd.model.device_memory import size_adapter_memory, size_kv_pool
from adapterd.model.kv import KV_BLOCK_SIZE
from adapterd.model.runner import Runner

logger = logging.getLogger(__name__)


class EngineSizes(Protocol):
    """The settings an engine needs; `config.EngineSettings` has them. Memory in bytes, None: by what is free, or as
    much as `max_loras` adapters of rank `max_lora_rank` on every linear take."""

    @property
    def kv_memory(self) -> int | None: ...
    @property
    def adapter_memory(self) -> int | None: ...
    @property
    def max_loras(self) -> int | None: ...
    @property
    def max_lora_rank(self) -> int | None: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_queue(self) -> int: ...


class WeightsInUse:
    """Host weights of the adapters that submitted sequences run, by reference.

    A client that goes away gives up its lease at once, while the step that is running may be about to upload
    its adapter: so the engine counts on references of its own, taken while the lease still stands.
    """

    def __init__(self, find: Callable[[AdapterId], Adapter]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._held: dict[AdapterId, tuple[Adapter, int]] = {}

    def hold(self, mix: AdapterMix) -> None:
        """Called by whoever submits, with the mix leased."""
        with self._lock:
            for adapter_id, _ in mix:
                adapter, count = self._held.get(adapter_id) or (self._find(adapter_id), 0)
                self._held[adapter_id] = adapter, count + 1

    def release(self, mix: AdapterMix) -> None:
        with self._lock:
            for adapter_id, _ in mix:
                adapter, count = self._held.pop(adapter_id)
                if count > 1:
                    self._held[adapter_id] = adapter, count - 1

    def get(self, adapter_id: AdapterId) -> Adapter:
        """Weights of an adapter that some unfinished sequence runs."""
        with self._lock:
            return self._held[adapter_id][0]


@dataclass(frozen=True)
class Finished:
    """One whole answer of an offline run."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]


def build_engine(
    base: Base,
    vocabulary: Vocabulary,
    weights: Callable[[AdapterId], Adapter],
    settings: EngineSizes,
    *,
    events: AdapterEvents | None = None,
) -> tuple[Runner, Engine]:
    """A runner with its memory set aside, and an engine over it. `weights` finds those of a leased version."""
    num_kv_blocks = size_kv_pool(base, settings.kv_memory, settings.max_num_seqs)
    adapter_bytes = size_adapter_memory(
        base, settings.adapter_memory, max_loras=settings.max_loras, max_rank=settings.max_lora_rank
    )
    in_use = WeightsInUse(weights)
    runner = Runner(
        base,
        num_kv_blocks=num_kv_blocks,
        adapter_bytes=adapter_bytes,
        max_num_seqs=settings.max_num_seqs,
        weights=in_use.get,
        max_lora_rank=settings.max_lora_rank,
        events=events,
    )
    memory = EngineMemory(
        num_kv_blocks=num_kv_blocks,
        kv_block_size=KV_BLOCK_SIZE,
        num_adapter_pages=runner.bank.num_pages,
        adapter_page_bytes=runner.bank.page_bytes,
        pages_of=runner.adapter_pages,
    )
    limits = SchedulerLimits(
        settings.max_num_batched_tokens,
        settings.max_num_seqs,
        max_num_scored_tokens=runner.max_num_scored_tokens,
    )
    engine = Engine(
        runner, in_use, base.spec, vocabulary, memory, limits, max_queue=settings.max_queue, events=events
    )
    if engine.max_model_len < base.spec.max_model_len:
        logger.warning(
            "KV memory holds %d tokens, so the context is limited to that; give more with --kv-memory",
            engine.max_model_len,
        )
    return runner, engine


def check_fits(runner: Runner, adapter: Adapter) -> None:
    """Raise AdapterRefused for an adapter that the whole adapter memory could not hold."""
    needed = runner.bank.pages_of(adapter) * runner.bank.page_bytes
    budget = runner.bank.num_pages * runner.bank.page_bytes
    if needed > budget:
        raise AdapterRefused(
            f"adapter '{adapter.id.name}' needs {needed / 2**20:.1f} MiB of adapter memory and the budget is "
            f"{budget / 2**20:.1f} MiB; start with --adapter-memory {-(-needed // 2**20)}MiB or more"
        )


def collect(engine: Engine) -> dict[tuple[RequestId, int], Finished]:
    """Step an engine until it is idle, and put the outputs together."""
    parts: dict[tuple[RequestId, int], list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            parts.setdefault((output.request_id, output.index), []).append(output)
    return {key: _join(outputs) for key, outputs in parts.items()}


def _join(outputs: Sequence[Output]) -> Finished:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Finished(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        finish_reason=reason,
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
