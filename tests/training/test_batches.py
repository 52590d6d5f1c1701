from pathlib import Path

import pytest
import torch

from adapterd.training.batches import (
    IGNORED,
    collate,
    epoch_batches,
    micro_batches,
    num_labels,
    pack,
    summed_loss,
)
from adapterd.training.data import Example
from tests.tiny import tiny_llama

CPU = torch.device("cpu")


def example(prompt: int, answer: int, line: int = 1) -> Example:
    return Example(line, tuple(range(10, 10 + prompt)), tuple(range(100, 100 + answer)))


def test_labels_stand_on_the_answer_and_nowhere_else() -> None:
    batch = collate([example(3, 2), example(1, 3)], pad_id=0, device=CPU)
    assert batch.input_ids.tolist() == [[10, 11, 12, 100], [10, 100, 101, 0]]
    assert batch.arguments["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, 100, 101],
        [100, 101, 102, IGNORED],
    ]


def test_only_positions_with_a_label_are_kept() -> None:
    batch = collate([example(6, 1), example(5, 1)], pad_id=0, device=CPU)
    assert batch.positions.tolist() == [4, 5]
    assert batch.labels.tolist() == [[IGNORED, 100], [100, IGNORED]]


def test_loss_is_the_plain_sum_over_rows_one_by_one(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path).eval()
    examples = [example(3, 2), example(7, 4), example(1, 9)]
    batch = collate(examples, pad_id=2, device=CPU)
    loss, right = summed_loss(model, batch)
    expected, expected_right = 0.0, 0
    for one in examples:
        ids = torch.tensor([[*one.prompt_ids, *one.answer_ids]])
        logprobs = model(input_ids=ids).logits[0].detach().log_softmax(-1)
        for offset, token in enumerate(one.answer_ids):
            at = logprobs[len(one.prompt_ids) - 1 + offset]
            expected -= float(at[token])
            expected_right += int(at.argmax()) == token
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert right == expected_right
    assert num_labels(examples) == 15


def test_each_epoch_holds_every_row_once_in_a_new_order() -> None:
    examples = [example(1 + i % 13, 1 + i % 7, line=i) for i in range(103)]
    epochs = [epoch_batches(examples, batch_size=8, seed=1, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(e.line for batch in batches for e in batch) == list(range(103))
        assert sorted(map(len, batches), reverse=True) == [8] * 12 + [7]
    assert epochs[0] != epochs[1]
    assert epochs[0] == epoch_batches(examples, batch_size=8, seed=1, epoch=0)
    assert epochs[0] != epoch_batches(examples, batch_size=8, seed=2, epoch=0)


def test_rows_of_like_length_go_together() -> None:
    examples = [example(1 + (i * 37) % 100, 1) for i in range(128)]
    batches = epoch_batches(examples, batch_size=8, seed=0, epoch=0)
    padding = sum(
        8 * max(e.num_tokens for e in batch) - sum(e.num_tokens for e in batch) for batch in batches
    )
    assert padding < 0.1 * sum(e.num_tokens for e in examples)


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_hold_all_rows_within_the_limit(packed: bool) -> None:
    examples = [example(4000, 1, line=i) for i in range(9)] + [example(20_000, 1, line=9)]
    examples.append(example(1, 1, line=10))
    parts = list(micro_batches(examples, max_tokens=16_384, vocab_size=2048, packed=packed))
    assert sorted(e.line for part in parts for e in part) == list(range(11))
    assert [len(part) for part in parts] == ([5, 4, 1, 1] if packed else [4, 4, 2, 1])


def test_micro_batches_hold_no_more_labels_than_their_logits_have_room_for() -> None:
    examples = [example(2, 1000, line=i) for i in range(4)]
    parts = micro_batches(examples, max_tokens=10**6, vocab_size=128_000, packed=True)
    assert [len(part) for part in parts] == [2, 2]


def test_packed_rows_lie_end_to_end_and_count_their_own_positions() -> None:
    batch = pack([example(3, 2), example(1, 3)], device=CPU)
    assert batch.input_ids.tolist() == [[10, 11, 12, 100, 10, 100, 101]]
    assert batch.arguments["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.positions.tolist() == [2, 3, 4, 5, 6]
    assert batch.labels.tolist() == [[100, 101, 100, 101, 102]]
    assert batch.arguments["paged"].lengths == (4, 3)
