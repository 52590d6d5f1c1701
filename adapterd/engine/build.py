"""An engine over a loaded base: the part of the daemon that needs no names and no text."""

import logging
from collections.abc import Callable
from typing import Protocol

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine, PinFailed
from adapterd.engine.scheduler import SchedulerLimits
from adapterd.engine.seams import EngineMemory
from adapterd.engine.weights import WeightsInUse
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


def build_engine(
    base: Base,
    vocabulary: Vocabulary,
    weights: Callable[[AdapterId], Adapter],
    settings: EngineSizes,
    *,
    events: AdapterEvents | None = None,
    on_pin_failed: PinFailed = lambda adapter_id, error: None,
) -> tuple[Runner, Engine]:
    """A runner with its memory set aside, and an engine over it. `weights` finds those of a leased version."""
    num_kv_blocks = size_kv_pool(base, settings.kv_memory, settings.max_num_seqs)
    adapter_bytes = size_adapter_memory(
        base, settings.adapter_memory, max_loras=settings.max_loras, max_rank=settings.max_lora_rank
    )
    in_use = WeightsInUse(weights, lambda adapter: runner.bank.pages_of(adapter))
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
    )
    limits = SchedulerLimits(
        settings.max_num_batched_tokens,
        settings.max_num_seqs,
        max_num_scored_tokens=runner.max_num_scored_tokens,
    )
    engine = Engine(
        runner,
        in_use,
        base.spec,
        vocabulary,
        memory,
        limits,
        max_queue=settings.max_queue,
        events=events,
        on_pin_failed=on_pin_failed,
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
