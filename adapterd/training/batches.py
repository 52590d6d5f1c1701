"""Examples to tensors: which rows go together, padding, labels, and the loss they share. No optimiser."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from adapterd.training.data import Example

IGNORED = -100
_MAX_TOKENS_PER_FORWARD = 16_384
_BUCKET_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right.

    input_ids, attention_mask: [rows, length]. positions: [kept], where any row has a label, in order.
    labels: [rows, kept], the next token at each of them, IGNORED where a row has none there.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


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


def micro_batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Parts of a batch that fit into memory together, the shortest first."""
    part: list[Example] = []
    for example in sorted(examples, key=lambda example: example.num_tokens):
        if part and (len(part) + 1) * example.num_tokens > _MAX_TOKENS_PER_FORWARD:
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def collate(examples: Sequence[Example], *, pad_id: int, device: torch.device) -> Batch:
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
    return Batch(input_ids.to(device), attention_mask.to(device), positions.to(device), kept.to(device))


def summed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed cross entropy of the batch's labels in nats, with gradient, and how many the model ranks first."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.positions,
        use_cache=False,
    ).logits.float()
    flat = batch.labels.flatten()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), flat, ignore_index=IGNORED, reduction="sum"
    )
    right = int(((logits.detach().argmax(-1).flatten() == flat) & (flat != IGNORED)).sum())
    return loss, right


def num_labels(examples: Sequence[Example]) -> int:
    return sum(len(example.answer_ids) for example in examples)
