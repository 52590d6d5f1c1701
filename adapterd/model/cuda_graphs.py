"""Decode steps replayed as CUDA graphs: one launch for the whole model, for any sequences and any adapters.

A step in which every sequence adds one token always has the same shape, up to the number of sequences. So its
inputs and tables live in one place (`DecodeInputs`), the forward over them is recorded once for each of a few
numbers of sequences, with and without adapters, and a step writes the tables and replays. A number in between runs
the next larger graph, the rows too many writing nowhere and attending to nothing.
"""

import logging
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from adapterd.core import ScheduledSequence
from adapterd.model.attention_triton import BlockPlan, TritonContext
from adapterd.model.base import Base
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.launch_triton import LAUNCH_ERRORS
from adapterd.model.launched import LastTokens
from adapterd.model.lora import Segment
from adapterd.model.lora_triton import TritonLoraStep
from adapterd.model.transfer import copy_to

logger = logging.getLogger(__name__)

_RECORDED_AT_START = 32
"""Graphs of up to so many sequences are recorded before the first request; larger ones when they are first needed."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 48, ...: at most half of a step's rows are idle, and above 32 at most a third."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size < max_num_seqs]
    return [*sizes, *range(32, max_num_seqs, 16), max_num_seqs]


class DecodeInputs:
    """What a decode step reads, in one place for all steps. `fill` writes it, `plan` shows it to the kernels.

    A token that the host does not know yet is read where the step before has left it: `last` lies before the rest of
    the numbers, and each row says at which place of them its input is, there or among those that `fill` has written.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self._max_num_seqs = max_num_seqs
        self._numbers = torch.zeros(5 * max_num_seqs, dtype=torch.long, device=device)
        self._places = torch.zeros(max_num_seqs * (4 + max_blocks), dtype=torch.int32, device=device)
        self._no_chunks = torch.zeros(0, 4, dtype=torch.int32, device=device)
        self._tables: dict[Hashable, tuple[list[int], torch.Tensor]] = {}
        self.last = LastTokens(self._numbers[:max_num_seqs])

    def input_ids(self, size: int) -> torch.Tensor:
        """int64 [1, size], gathered when it is asked."""
        return self._numbers.index_select(0, self._part(3, size)).view(1, size)

    def position_ids(self, size: int) -> torch.Tensor:
        """int64 [1, size]."""
        return self._part(1, size).view(1, size)

    def plan(self, size: int) -> BlockPlan:
        return BlockPlan(
            slot_mapping=self._part(2, size),
            block_tables=self._places[4 * size :],
            singles=self._places[: 4 * size].view(size, 4),
            chunks=self._no_chunks,
        )

    def _part(self, index: int, size: int) -> torch.Tensor:
        """Known input ids, positions, slots, and the places of the input ids: one after another behind `last`."""
        first = self._max_num_seqs + index * size
        return self._numbers[first : first + size]

    def fill(self, scheduled: Seq[ScheduledSequence], size: int) -> None:
        """One token of each sequence in the first rows; the rows up to `size` are no tokens."""
        ids, positions, slots, tiles = [0] * size, [0] * size, [-1] * size, [0] * (4 * size)
        sources = list(range(self._max_num_seqs, self._max_num_seqs + size))
        tables: dict[Hashable, tuple[list[int], torch.Tensor]] = {}
        place = 0
        for row, item in enumerate(scheduled):
            sequence, position = item.sequence, item.start
            block = sequence.block_table[position // KV_BLOCK_SIZE]
            positions[row] = position
            if position < len(sequence.token_ids):
                ids[row] = sequence.token_ids[position]
            else:
                sources[row] = self.last.row(sequence)
            slots[row] = block * KV_BLOCK_SIZE + position % KV_BLOCK_SIZE
            tiles[4 * row : 4 * row + 4] = place, row, 1, position
            key = sequence.request.id, sequence.index
            known = self._tables.get(key)
            # Tables change once in KV_BLOCK_SIZE steps, and to compare lists is quicker than to make a tensor.
            if known is None or known[0] != sequence.block_table:
                known = list(sequence.block_table), torch.tensor(sequence.block_table, dtype=torch.int32)
            tables[key] = known
            place += len(sequence.block_table)
        self._tables = tables
        numbers = torch.tensor([*ids, *positions, *slots, *sources])
        places = torch.cat([torch.tensor(tiles, dtype=torch.int32), *(table for _, table in tables.values())])
        for target, source in ((self._numbers[self._max_num_seqs :], numbers), (self._places, places)):
            copy_to(target[: len(source)], source)


Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Takes a forward over tensors that keep their place; what it returns runs the same again, on what they hold then."""


class CudaGraphRecorder:
    """Records on a CUDA device. Graphs share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        # A first run beside the recording: kernels are compiled and libraries make their workspaces.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            forward()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: an adapter may be on its way in another, and what that calls is not to be recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


@dataclass(frozen=True)
class _Recorded:
    """generation: of the adapter tables when it was recorded; see TritonLoraStep."""

    replay: Callable[[], torch.Tensor]
    generation: int


class GraphedForward:
    """The base's forward for decode steps. It belongs to the thread that runs the batches."""

    def __init__(
        self, base: Base, step: TritonLoraStep, kv: KVPool, max_num_seqs: int, record: Recorder
    ) -> None:
        self._base = base
        self._step = step
        self._record = record
        self._sizes = graph_sizes(max_num_seqs)
        max_blocks = min(-(-base.spec.max_model_len // KV_BLOCK_SIZE), kv.num_blocks)
        self._inputs = DecodeInputs(self._sizes[-1], max_blocks, base.device)
        self._pool = kv
        self.last = self._inputs.last
        self._recorded: dict[tuple[int, bool], _Recorded] = {}
        self._works = True

    def takes(self, scheduled: Seq[ScheduledSequence]) -> bool:
        """Whether a step is one of those that are recorded: one token a sequence."""
        return (
            self._works
            and len(scheduled) <= self._sizes[-1]
            and all(item.num_tokens == 1 for item in scheduled)
        )

    def record_all(self, with_adapters: bool) -> None:
        """Record the small sizes now, so that no request waits for it. Largest first: the others fit its memory."""
        for size in reversed([size for size in self._sizes if size <= _RECORDED_AT_START]):
            for has_adapters in (True, False) if with_adapters else (False,):
                if self._works:
                    self._inputs.fill((), size)
                    self._begin((), size, has_adapters)
                    self._replay(size, has_adapters)

    def run(self, scheduled: Seq[ScheduledSequence], segments: tuple[Segment, ...]) -> torch.Tensor | None:
        """Logits [num_sequences, vocab_size], gone at the next call; None if this base cannot be recorded."""
        size = next(size for size in self._sizes if size >= len(scheduled))
        self._inputs.fill(scheduled, size)
        self._begin(segments, size, bool(segments))
        logits = self._replay(size, bool(segments))
        return None if logits is None else logits[: len(scheduled)]

    def _begin(self, segments: tuple[Segment, ...], size: int, has_adapters: bool) -> None:
        if has_adapters:
            self._step.begin_fixed(segments, size)
        else:
            self._step.begin((), size)

    def _replay(self, size: int, has_adapters: bool) -> torch.Tensor | None:
        key = size, has_adapters
        found = self._recorded.get(key)
        if found is None or (has_adapters and found.generation != self._step.generation):
            recorded = self._try_to_record(size)
            if recorded is None:
                return None
            found = self._recorded[key] = _Recorded(recorded, self._step.generation)
        return found.replay()

    def _try_to_record(self, size: int) -> Callable[[], torch.Tensor] | None:
        try:
            return self._record(lambda: self._forward(size))
        except LAUNCH_ERRORS as error:
            # A family that asks the device in mid-forward, of its experts' load, say, or a chip too small for a kernel.
            logger.warning("decode steps run without CUDA graphs: %s", str(error).partition("\n")[0])
            self._works = False
            self._recorded.clear()
            return None

    def _forward(self, size: int) -> torch.Tensor:
        output = self._base.model(
            input_ids=self._inputs.input_ids(size),
            position_ids=self._inputs.position_ids(size),
            use_cache=False,
            paged=TritonContext(self._pool, self._inputs.plan(size)),
        )
        logits: torch.Tensor = output.logits[0]
        return logits
