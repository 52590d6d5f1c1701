"""Runs a decided batch on the device: adapter memory, one packed forward, logits of the rows that need them.

It decides nothing: which sequences, blocks and adapters are in the batch was settled by the engine.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterEvents, AdapterId, Batch, ScheduledSequence, Sequence
from adapterd.model.attention import paged_context
from adapterd.model.base import Base
from adapterd.model.device_memory import longest_row
from adapterd.model.editor import Editor
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.launched import LastTokens, Launched, RowResults
from adapterd.model.lora import LoraBank, Segment
from adapterd.model.sampler import SamplerRow, start_logprobs, start_sampling
from adapterd.model.transfer import Readback, to_device
from adapterd.model.uploads import AdapterUploads, Uploaded

if TYPE_CHECKING:
    from adapterd.model.cuda_graphs import GraphedForward

logger = logging.getLogger(__name__)

_SCORED_LOGITS_BYTES = 128 << 20
"""Of the logits of a step's prompts whose own log probabilities are asked for: little beside what a GPU leaves free."""


@dataclass(frozen=True)
class _Wanted:
    """Rows of the batch whose logits are needed for one scheduled sequence.

    prompt_rows predict the prompt's own tokens (only if asked for); last_row predicts the next token.
    """

    prompt_rows: range
    last_row: int | None

    @property
    def rows(self) -> list[int]:
        return [*self.prompt_rows, *([] if self.last_row is None else [self.last_row])]


class Runner:
    """The base, its KV pool and its adapter memory, driven from one thread: batches run in the order of their launch.

    `max_in_flight`: see `engine.seams.BatchRunner`. A CPU has done a batch when its launch returns.
    `max_lora_rank`: of adapters that will be served, where that is known.
    """

    def __init__(
        self,
        base: Base,
        *,
        num_kv_blocks: int,
        adapter_bytes: int,
        max_num_seqs: int,
        weights: Callable[[AdapterId], Adapter],
        max_lora_rank: int | None = None,
        events: AdapterEvents | None = None,
    ) -> None:
        self._base = base
        self._weights = weights
        self.kv = KVPool(base.kv_shapes, num_kv_blocks, base.dtype, base.device)
        self.bank = LoraBank(
            base.spec.lora_targets,
            adapter_bytes,
            base.dtype,
            base.device,
            longest_row=longest_row(base.spec),
        )
        base.lora_step.reserve(self.bank, max_num_seqs, max_lora_rank or 0)
        self._uploads = AdapterUploads(self.bank, base.device, events)
        self._editor = Editor(base.model, base.lora_step, base.spec.modules)
        self._num_steps_with_edits = 0
        self.max_in_flight = 1 if base.device.type == "cuda" else 0
        self._graphs = _graphs(base, self.kv, max_num_seqs, has_adapters=self.bank.num_pages > 0)
        if self._graphs is not None:
            self._last = self._graphs.last
        else:
            self._last = LastTokens(torch.zeros(max_num_seqs, dtype=torch.long, device=base.device))

    @property
    def num_steps_with_edits(self) -> int:
        """Steps that ran without graphs and fast layers, for adapters that change more than linears."""
        return self._num_steps_with_edits

    @property
    def max_num_scored_tokens(self) -> int:
        """Rows of logits that a step may hold for prompts' own log probabilities."""
        row_bytes = self._base.spec.vocab_size * self._base.dtype.itemsize
        return max(_SCORED_LOGITS_BYTES // row_bytes, 1)

    def on_uploaded(self, tell: Uploaded) -> None:
        """Who is told of each upload, in a thread of the uploads' own."""
        self._uploads.tell = tell

    def launch(self, batch: Batch) -> Launched:
        """Begin a batch; `collect` its results later. Its uploads are begun too, and go on beside the steps."""
        for adapter_id in batch.evictions:
            self.bank.evict(adapter_id)
        for adapter_id in batch.uploads:
            self._uploads.begin(self._weights(adapter_id))
        if not batch.scheduled:
            return Launched((), None, Readback(self._base.device))
        wanted = _wanted_rows(batch)
        with torch.inference_mode():
            logits = self._forward(batch, wanted)
            return self._sample(batch, wanted, logits)

    def _forward(self, batch: Batch, wanted: list[_Wanted]) -> torch.Tensor:
        """Logits [num_wanted_rows, vocab_size], rows in the order of `wanted`."""
        keep = [row for of_sequence in wanted for row in of_sequence.rows]
        segments = self._segments(batch)
        has_edits = any(segment.edits for segment in segments)
        if has_edits or self._editor.is_active:
            self._editor.begin(segments, batch.num_tokens, keep or [0])
        self._num_steps_with_edits += has_edits
        if self._graphs is not None and not has_edits and self._graphs.takes(batch.scheduled):
            all_rows = self._graphs.run(batch.scheduled, segments)
            if all_rows is not None:
                if len(keep) == batch.num_tokens:
                    return all_rows
                return all_rows[to_device(torch.tensor(keep, dtype=torch.long), all_rows.device)]
        self._base.lora_step.begin(tuple(s for s in segments if s.products), batch.num_tokens)
        context = self._base.paged_context(
            self.kv,
            [_slots(item.sequence, item.end) for item in batch.scheduled],
            [item.num_tokens for item in batch.scheduled],
        )
        # A batch of unfinished chunks needs no logits, but the model must be given some row.
        ids, positions, kept = self._numbers(batch, keep or [0])
        output = self._base.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=kept,
            paged=context,
        )
        logits: torch.Tensor = output.logits[0]
        return logits[: len(keep)]

    def _numbers(self, batch: Batch, keep: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input ids and positions, int64 [num_tokens], and `keep`, on the device by one copy."""
        ids: list[int] = []
        positions: list[int] = []
        pending_rows: list[int] = []
        sources: list[int] = []
        for item in batch.scheduled:
            known = item.sequence.token_ids[item.start : item.end]
            if len(known) < item.num_tokens:
                known.append(0)  # a place for the token that the step before has sampled
                pending_rows.append(len(ids) + item.num_tokens - 1)
                sources.append(self._last.row(item.sequence))
            ids.extend(known)
            positions.extend(range(item.start, item.end))
        parts = (ids, positions, keep, pending_rows, sources)
        numbers = to_device(torch.tensor([n for part in parts for n in part]), self._base.device)
        on_device = numbers.split_with_sizes([len(part) for part in parts])
        if pending_rows:
            on_device[0].index_copy_(0, on_device[3], self._last.tokens.index_select(0, on_device[4]))
        return on_device[0], on_device[1], on_device[2]

    def _segments(self, batch: Batch) -> tuple[Segment, ...]:
        """Neighbours with one mix share a segment; sequences come sorted by mix."""
        segments: list[Segment] = []
        previous = None
        row = 0
        for item in batch.scheduled:
            mix, end = item.sequence.mix, row + item.num_tokens
            if mix and mix == previous:
                segments[-1] = replace(segments[-1], end=end)
            elif mix:
                segments.append(Segment(row, end, self.bank.products(mix), self.bank.edits(mix)))
            previous, row = mix, end
        return tuple(segments)

    def _sample(self, batch: Batch, wanted: list[_Wanted], logits: torch.Tensor) -> Launched:
        """`logits` rows follow `wanted`: for each sequence its prompt rows, then its last row."""
        readback = Readback(logits.device)
        results: list[RowResults] = []
        last_rows: list[int] = []
        row = 0
        for item, rows in zip(batch.scheduled, wanted, strict=True):
            found = None
            if rows.prompt_rows:
                targets = item.sequence.token_ids[item.start + 1 : item.start + 1 + len(rows.prompt_rows)]
                found = start_logprobs(
                    logits[row : row + len(targets)],
                    to_device(torch.tensor(targets), logits.device),
                    [item.sequence.request.params.prompt_logprobs or 0] * len(targets),
                    readback,
                )
                row += len(targets)
            if rows.last_row is not None:
                last_rows.append(row)
                row += 1
            results.append(RowResults(rows.last_row is not None, found))
        sampling = None
        sampled = [item for item in batch.scheduled if item.samples]
        if sampled:
            if len(last_rows) < len(logits):
                logits = logits[to_device(torch.tensor(last_rows), logits.device)]
            sampling = start_sampling(logits, [_sampler_row(item) for item in sampled], readback)
            self._last.keep([item.sequence for item in sampled], sampling.token_ids)
        readback.close()
        return Launched(results, sampling, readback)


def _graphs(base: Base, kv: KVPool, max_num_seqs: int, has_adapters: bool) -> "GraphedForward | None":
    """Decode steps from CUDA graphs, where the kernels are those that can be recorded."""
    if base.device.type != "cuda" or base.paged_context is paged_context:
        return None
    from adapterd.model.cuda_graphs import CudaGraphRecorder, GraphedForward
    from adapterd.model.lora_triton import TritonLoraStep

    assert isinstance(base.lora_step, TritonLoraStep)
    graphs = GraphedForward(base, base.lora_step, kv, max_num_seqs, CudaGraphRecorder())
    with torch.inference_mode():
        graphs.record_all(has_adapters)
    return graphs


def _wanted_rows(batch: Batch) -> list[_Wanted]:
    wanted = []
    row = 0
    for item in batch.scheduled:
        prompt_rows = range(0)
        if item.sequence.request.params.prompt_logprobs is not None:
            # Row of position p predicts token p + 1, which must still be one of the prompt's.
            last = min(item.end, item.sequence.num_prompt_tokens - 1)
            prompt_rows = range(row, row + max(last - item.start, 0))
        wanted.append(_Wanted(prompt_rows, row + item.num_tokens - 1 if item.samples else None))
        row += item.num_tokens
    return wanted


def _slots(sequence: Sequence, end: int) -> torch.Tensor:
    """int64 [end]: the pool slot of each of a sequence's first `end` tokens."""
    num_blocks = -(-end // KV_BLOCK_SIZE)
    blocks = torch.tensor(sequence.block_table[:num_blocks])
    return (blocks[:, None] * KV_BLOCK_SIZE + torch.arange(KV_BLOCK_SIZE)).flatten()[:end]


def _sampler_row(item: ScheduledSequence) -> SamplerRow:
    sequence, params = item.sequence, item.sequence.request.params
    output_index = item.end - sequence.num_prompt_tokens
    suppressed: frozenset[int] = frozenset()
    if output_index < params.min_tokens:
        suppressed = sequence.request.eos_token_ids.union(params.stop_token_ids)
    if params.has_penalties:
        sequence.token_counts.update(sequence.token_ids, sequence.num_prompt_tokens)
    return SamplerRow(params, sequence.seed, sequence.token_counts, output_index, suppressed)
