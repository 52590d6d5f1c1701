"""Decode steps from fixed tables give what the same steps give without: any number of sequences, any adapters.

Without a CUDA device a recording is the forward itself, run again: what is proven is that it reads nothing but what
lies in the fixed tables. On one, it is a CUDA graph.
"""

from collections.abc import Callable

import pytest
import torch

from adapterd.core import (
    AdapterMix,
    Batch,
    Request,
    RequestId,
    SampledToken,
    SamplingParams,
    ScheduledSequence,
    Sequence,
)
from adapterd.model.kv import KV_BLOCK_SIZE
from adapterd.model.lora import Segment
from tests.exactness.families import linear_names, save_adapter, save_model
from tests.model.test_lora import upload
from tests.offline import Offline, OfflineSettings
from tests.triton_kernels import DEVICE, IS_INTERPRETED

from adapterd.model.cuda_graphs import (  # isort: skip  (needs the interpreter's setting)
    CudaGraphRecorder,
    DecodeInputs,
    GraphedForward,
    graph_sizes,
)
from adapterd.model.lora_triton import TritonLoraStep  # isort: skip
from triton.runtime.errors import OutOfResources  # isort: skip

# Rows that are no token are computed from whatever lay in memory, and read by nobody.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

GREEDY = SamplingParams(max_tokens=9, temperature=0.0, logprobs=3)


def run_again(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    forward()  # a recording runs twice, once to warm up
    return forward


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    root = tmp_path_factory.mktemp("graphs")
    save_model("llama", root / "base")
    names = linear_names(root / "base", "llama")
    save_adapter(root / "base", root / "wide", rank=8, targets=names, seed=1)
    save_adapter(root / "base", root / "narrow", rank=3, targets=names[:2], seed=2)
    save_adapter(root / "base", root / "high", rank=100, targets=names[:1], seed=3)
    device = "cpu" if IS_INTERPRETED else "cuda"
    settings = OfflineSettings(base=str(root / "base"), device=device, kernels="triton", max_num_seqs=6)
    offline = Offline(settings)
    for name in ("wide", "narrow", "high"):
        offline.load(name, root / name)
        upload(offline.runner.bank, offline.adapters[name])
    return offline


def make_sequence(index: int, length: int, mix: AdapterMix, first_block: int) -> Sequence:
    prompt = tuple((7 * index + 3 * i) % 90 + 3 for i in range(length))
    request = Request(RequestId(f"r{index}"), prompt, GREEDY, mix, frozenset(), 0.0)
    num_blocks = -(-(length + 8) // KV_BLOCK_SIZE)
    # Blocks of two sequences lie among one another.
    blocks = [first_block + 2 * i for i in range(num_blocks)]
    return Sequence(request, 0, seed=0, token_ids=list(prompt), block_table=blocks)


def segments_of(offline: Offline, scheduled: list[ScheduledSequence]) -> tuple[Segment, ...]:
    found = [(row, item.sequence.mix) for row, item in enumerate(scheduled) if item.sequence.mix]
    return tuple(Segment(row, row + 1, offline.runner.bank.products(mix)) for row, mix in found)


@torch.inference_mode()
def test_replayed_steps_are_the_steps_themselves(offline: Offline) -> None:
    runner, base = offline.runner, offline.base
    wide, narrow = (((offline.adapters[name].id, 1.0),) for name in ("wide", "narrow"))
    both: AdapterMix = (*wide, (narrow[0][0], 0.5))
    sequences = [
        make_sequence(i, length, mix, first_block)
        for i, (length, mix, first_block) in enumerate(
            [(5, (), 0), (30, (), 1), (16, wide, 10), (17, narrow, 11), (2, both, 20)]
        )
    ]
    step = base.lora_step
    assert isinstance(step, TritonLoraStep)
    recorder = run_again if IS_INTERPRETED else CudaGraphRecorder()
    graphs = GraphedForward(base, step, runner.kv, 6, recorder)
    first = runner.launch(Batch(tuple(ScheduledSequence(s, 0, s.num_tokens) for s in sequences))).collect()
    for sequence, sampled in zip(sequences, first, strict=True):
        assert sampled.token_id is not None
        sequence.token_ids.append(sampled.token_id)
    # Others each time: adapters and none, one that comes, one that leaves, other sizes and orders.
    for members in ([0, 1, 2, 3, 4], [0, 1], [2], [0, 4, 3], [1, 2, 4, 3]):
        chosen = [sequences[i] for i in members]
        scheduled = [ScheduledSequence(s, s.num_tokens - 1, 1) for s in chosen]
        assert graphs.takes(scheduled)
        logits = graphs.run(scheduled, segments_of(offline, scheduled))
        assert logits is not None
        found = logits.float().log_softmax(-1).cpu()
        expected = runner.launch(Batch(tuple(scheduled))).collect()
        for row, sampled in zip(found, expected, strict=True):
            check_row(row, sampled)
        for sequence, sampled in zip(chosen, expected, strict=True):
            assert sampled.token_id is not None
            sequence.token_ids.append(sampled.token_id)


@torch.inference_mode()
def test_first_adapter_of_a_high_rank_finds_graphs_ready_for_it(offline: Offline) -> None:
    step = offline.base.lora_step
    assert isinstance(step, TritonLoraStep)
    recorder = run_again if IS_INTERPRETED else CudaGraphRecorder()
    graphs = GraphedForward(offline.base, step, offline.runner.kv, 6, recorder)
    graphs.record_all(with_adapters=True)
    generation = step.generation
    sequence = make_sequence(0, 5, ((offline.adapters["high"].id, 1.0),), 0)
    first = offline.runner.launch(Batch((ScheduledSequence(sequence, 0, 5),))).collect()[0]
    assert first.token_id is not None
    sequence.token_ids.append(first.token_id)
    scheduled = [ScheduledSequence(sequence, 5, 1)]
    logits = graphs.run(scheduled, segments_of(offline, scheduled))
    assert logits is not None
    found = logits.float().log_softmax(-1).cpu()
    check_row(found[0], offline.runner.launch(Batch(tuple(scheduled))).collect()[0])
    assert step.generation == generation


@torch.inference_mode()
def test_token_that_the_host_does_not_know_is_read_where_the_last_step_left_it(offline: Offline) -> None:
    step = offline.base.lora_step
    assert isinstance(step, TritonLoraStep)
    recorder = run_again if IS_INTERPRETED else CudaGraphRecorder()
    graphs = GraphedForward(offline.base, step, offline.runner.kv, 6, recorder)
    sequences = [make_sequence(i, length, (), 10 * i) for i, length in enumerate((5, 17, 9))]
    offline.runner.launch(Batch(tuple(ScheduledSequence(s, 0, s.num_tokens) for s in sequences))).collect()
    tokens = [41, 7, 88]
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.token_ids.append(token)
    scheduled = [ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences]
    known = graphs.run(scheduled, ())
    assert known is not None
    expected = known.clone()
    # The second is known to the host, the others come from a step that had its rows in another order.
    for i in (0, 2):
        sequences[i].token_ids.pop()
        sequences[i].num_pending = 1
    graphs.last.keep([sequences[2], sequences[0]], torch.tensor([88, 41], device=DEVICE))
    found = graphs.run(scheduled, ())
    assert found is not None
    assert torch.equal(found, expected)


def check_row(log_probs: torch.Tensor, sampled: SampledToken) -> None:
    assert sampled.logprobs is not None
    for token, value in sampled.logprobs.top:
        assert log_probs[token].item() == pytest.approx(value, abs=1e-4)
    assert int(log_probs.argmax()) == sampled.token_id


def test_steps_that_add_several_tokens_or_too_many_sequences_are_not_taken(offline: Offline) -> None:
    step = offline.base.lora_step
    assert isinstance(step, TritonLoraStep)
    graphs = GraphedForward(offline.base, step, offline.runner.kv, 6, run_again)
    sequences = [make_sequence(i, 4, (), i) for i in range(7)]
    assert graphs.takes([ScheduledSequence(s, 3, 1) for s in sequences[:6]])
    assert not graphs.takes([ScheduledSequence(s, 3, 1) for s in sequences])
    assert not graphs.takes([ScheduledSequence(sequences[0], 2, 2)])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("not permitted while capturing\nmore"), "not permitted while capturing"),
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory"),
    ],
)
@torch.inference_mode()
def test_base_that_cannot_be_recorded_runs_without_graphs_and_says_so_once(
    offline: Offline, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    def refuse(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise error

    step = offline.base.lora_step
    assert isinstance(step, TritonLoraStep)
    graphs = GraphedForward(offline.base, step, offline.runner.kv, 6, refuse)
    graphs.record_all(with_adapters=True)
    (line,) = caplog.messages
    assert line.startswith(f"decode steps run without CUDA graphs: {reason}")
    assert "more" not in line
    assert not graphs.takes([ScheduledSequence(make_sequence(0, 4, (), 0), 3, 1)])


def test_sizes_leave_few_rows_idle() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    for max_num_seqs in (1, 5, 31, 32, 33, 100, 256):
        sizes = graph_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes))
        for count in range(1, max_num_seqs + 1):
            size = next(size for size in sizes if size >= count)
            assert size < 2 * count + 1
        assert sizes[-1] == max_num_seqs


def test_tables_of_a_step_lie_where_those_of_the_last_lay() -> None:
    inputs = DecodeInputs(4, 8, DEVICE)
    sequences = [make_sequence(i, 20 + i, (), 3 * i) for i in range(3)]
    plan = inputs.plan(4)
    for count in (3, 1, 2):
        inputs.fill([ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences[:count]], 4)
        assert plan.singles[:, 2].tolist() == [1] * count + [0] * (4 - count)
        assert plan.slot_mapping[count:].tolist() == [-1] * (4 - count)
        for row, sequence in enumerate(sequences[:count]):
            place, _, _, position = plan.singles[row].tolist()
            assert (
                plan.block_tables[place : place + len(sequence.block_table)].tolist() == sequence.block_table
            )
            assert position == sequence.num_tokens - 1
            assert inputs.input_ids(4)[0, row] == sequence.token_ids[-1]
            assert inputs.position_ids(4)[0, row] == position
            sequence.token_ids.append(7)
        sequences[0].block_table = [5, 4, 3]  # lost its memory and found other
