"""Chats -> packed training rows: token ids, loss weights, and which chat each token belongs to.

Several short chats share a row, and none sees another: the mask is causal inside a chat and positions restart with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pretraining.corpus.drills import Message
from pretraining.tokenizer import IM_END, IM_START


@dataclass(frozen=True)
class Row:
    """One packed row of `length` tokens."""

    ids: Tensor  # int64 [length]
    weights: Tensor  # float32 [length]: loss weight of predicting this token; 0 on padding and a chat's start
    chats: Tensor  # int64 [length]: number of the chat inside the row; padding counts as one more chat
    positions: Tensor  # int64 [length]: restart at 0 with each chat


@dataclass(frozen=True)
class Encoded:
    """One chat as token ids with a loss weight each."""

    ids: list[int]
    weights: list[float]


def encode(
    tokenizer: PreTrainedTokenizerFast, chats: Iterable[list[Message]], user_weight: float
) -> list[Encoded]:
    """Render each chat as the chat template does; weight 1 on answers with their end mark, `user_weight` elsewhere."""
    pieces: list[str] = []
    owners: list[tuple[int, float]] = []
    count = 0
    for number, chat in enumerate(chats):
        count = number + 1
        for message in chat:
            answer = message["role"] == "assistant"
            pieces += [f"{IM_START}{message['role']}\n", f"{message['content']}{IM_END}", "\n"]
            owners += [(number, user_weight), (number, 1.0 if answer else user_weight), (number, 0.0)]
    encoded = [Encoded([], []) for _ in range(count)]
    backend = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    for (number, weight), piece in zip(owners, backend, strict=True):
        encoded[number].ids.extend(piece.ids)
        encoded[number].weights.extend([weight] * len(piece.ids))
    for chat_ in encoded:
        chat_.weights[0] = 0.0
    return encoded


def pack(chats: Iterable[Encoded], length: int, pad_id: int) -> Iterator[Row]:
    """First-fit-decreasing packing into rows of `length` tokens; chats longer than a row are left out."""
    bins: list[list[Encoded]] = []
    room: list[int] = []
    for chat in sorted(chats, key=lambda chat: -len(chat.ids)):
        size = len(chat.ids)
        if size > length:
            continue
        at = next((index for index, left in enumerate(room) if left >= size), None)
        if at is None:
            bins.append([])
            room.append(length)
            at = len(bins) - 1
        bins[at].append(chat)
        room[at] -= size
    for chats_of_row, left in zip(bins, room, strict=True):
        ids: list[int] = []
        weights: list[float] = []
        owner: list[int] = []
        positions: list[int] = []
        for number, chat in enumerate(chats_of_row):
            ids += chat.ids
            weights += chat.weights
            owner += [number] * len(chat.ids)
            positions += range(len(chat.ids))
        ids += [pad_id] * left
        weights += [0.0] * left
        owner += [len(chats_of_row)] * left
        positions += range(left)
        yield Row(torch.tensor(ids), torch.tensor(weights), torch.tensor(owner), torch.tensor(positions))


def mask(chats: Tensor) -> Tensor:
    """The attention mask of rows, bool [rows, 1, length, length]: causal, and only inside one chat.

    chats: int64 [rows, length].
    """
    same = chats[:, :, None] == chats[:, None, :]
    return torch.tril(same)[:, None]
