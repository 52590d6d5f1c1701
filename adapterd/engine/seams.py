"""What the engine is given: the device behind a runner, its memory in numbers, and who keeps weights on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapterd.core import AdapterId, AdapterMix, Batch, SampledToken

Uploaded = Callable[[AdapterId, str | None], None]
"""Told, from any thread, that an upload has ended, and why it came to nothing if it did."""


class LaunchedStep(Protocol):
    """A batch on its way through the device."""

    def collect(self) -> list[SampledToken]:
        """Wait for it: one result for each scheduled sequence, in order. Steps are collected as they were launched."""
        ...


class BatchRunner(Protocol):
    """The seam to the device; `model.runner.Runner` is the real one.

    `max_in_flight` is how many steps may be launched and not collected when another is launched: 0 or 1. The runner
    itself knows the tokens of the step launched last, wherever a sequence's newest token is still pending.

    A sequence may count on blocks that another one fills in the same batch: each layer writes the keys and values of
    all before it reads any.

    `launch` begins the batch's uploads and does not wait for them; each is told once to what `on_uploaded` was given.

    `num_steps_with_edits` counts steps whose adapters change more than linears: no graph and no fast layer holds them.
    """

    @property
    def max_in_flight(self) -> int: ...

    @property
    def num_steps_with_edits(self) -> int: ...

    def launch(self, batch: Batch) -> LaunchedStep: ...

    def on_uploaded(self, tell: Uploaded) -> None: ...


class HostWeights(Protocol):
    """Keeps adapters' weights on the host while sequences may need them; see `engine.weights.WeightsInUse`."""

    def hold(self, mix: AdapterMix) -> None: ...

    def release(self, mix: AdapterMix) -> None: ...

    def num_pages(self, adapter_id: AdapterId) -> int:
        """Pages of adapter memory that a version takes, while its weights are held."""
        ...


@dataclass(frozen=True)
class EngineMemory:
    """What the runner has set aside."""

    num_kv_blocks: int
    kv_block_size: int
    num_adapter_pages: int
    adapter_page_bytes: int
