"""Examples to tensors: which rows go together, packed or padded, labels, and the loss they share. No optimiser."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterd.training.data import Example
from adapterd.training.packing import PackedRows, row_positions

IGNORED = -100
_BUCKET_BATCHES = 16
_MAX_LOGITS = 2**28
"""Logits of one forward, a gigabyte in float32: with a vocabulary of 150,000 they are what fills a small GPU."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward.

    Padded: side by side, padded on the right; input_ids [rows, length]. Packed: end to end; [1, num_tokens].
    positions: [kept], where any row has a label, in order. labels: [rows or 1, kept], the next token at each of
    them, IGNORED where a row has none there. arguments: what else the model is called with.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    arguments: Mapping[str, Any]


def epoch_batches(
    examples: Sequence[Example], *, batch_size: int, seed: int, epoch: int
) -> list[list[Example]]:
    """A new random order each epoch, in which batches hold rows of like length so that little is padding."""
    rng = random.Random(f"{seed}:{epoch}")
    order = list(examples)
    rng.shuffle(order)
    batches = []
    bucket = batch_size * _BUCKET_BATCHES
    for start in range(0, len(order), bucket):
        alike = sorted(order[start : start + bucket], key=lambda example: example.num_tokens)
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    rng.shuffle(batches)
    return batches


def micro_batches(
    examples: Sequence[Example], *, max_tokens: int, vocab_size: int, packed: bool
) -> Iterator[list[Example]]:
    """Parts of a batch that fit into memory together, the shortest rows first.

    At most `max_tokens` are computed at once, padding counted unless packed, and no more labels than logits of
    `vocab_size` have room for; a row that is longer goes alone.
    """
    max_labels = max(_MAX_LOGITS // vocab_size, 1)
    part: list[Example] = []
    tokens = labels = 0
    for example in sorted(examples, key=lambda example: example.num_tokens):
        length = example.num_tokens
        labels += len(example.answer_ids)
        tokens = tokens + length if packed else (len(part) + 1) * length
        if part and (tokens > max_tokens or labels > max_labels):
            yield part
            part, tokens, labels = [], length, len(example.answer_ids)
        part.append(example)
    if part:
        yield part


def collate(examples: Sequence[Example], *, pad_id: int, device: torch.device) -> Batch:
    """The examples side by side, padded on the right."""
    # The last token is only ever a label, so it is not computed.
    length = max(example.num_tokens for example in examples) - 1
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        tokens = torch.tensor([*example.prompt_ids, *example.answer_ids])
        input_ids[row, : len(tokens) - 1] = tokens[:-1]
        attention_mask[row, : len(tokens) - 1] = 1
        labels[row, len(example.prompt_ids) - 1 : len(tokens) - 1] = tokens[len(example.prompt_ids) :]
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    kept = labels[:, positions]
    return Batch(
        input_ids.to(device),
        positions.to(device),
        kept.to(device),
        {"attention_mask": attention_mask.to(device)},
    )


def pack(examples: Sequence[Example], *, device: torch.device) -> Batch:
    """The examples end to end, for a model whose attention is `model/attention.py`'s."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        first = len(ids) + len(example.prompt_ids) - 1
        positions += range(first, first + len(example.answer_ids))
        labels += example.answer_ids
        ids += [*example.prompt_ids, *example.answer_ids[:-1]]
    lengths = tuple(example.num_tokens - 1 for example in examples)
    return Batch(
        torch.tensor([ids], device=device),
        torch.tensor(positions, device=device),
        torch.tensor([labels], device=device),
        {"position_ids": row_positions(lengths, device), "paged": PackedRows(lengths)},
    )


def label_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """float32 [rows or 1, kept, vocab_size]: what the model says at the batch's positions."""
    output = model(
        input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False, **batch.arguments
    )
    logits: torch.Tensor = output.logits.float()
    return logits


def summed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed cross entropy of the batch's labels in nats, with gradient, and how many the model ranks first."""
    logits = label_logits(model, batch).flatten(0, 1)
    flat = batch.labels.flatten()
    loss = torch.nn.functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
    right = int(((logits.detach().argmax(-1) == flat) & (flat != IGNORED)).sum())
    return loss, right


def num_labels(examples: Sequence[Example]) -> int:
    return sum(len(example.answer_ids) for example in examples)
