"""The largest value of many tensors, at little cost for whoever computes on the other cores."""

from collections.abc import Iterable, Iterator

import torch

_PIECE_ELEMENTS = 32_000
"""torch spreads reductions of 32768 elements and more over all cores, which the running step needs."""


def peak_of(tensors: Iterable[torch.Tensor]) -> float:
    """The largest absolute value; 0 for no tensors, NaN where there is any."""
    ends: list[torch.Tensor] = []
    batch: list[torch.Tensor] = []
    room = _PIECE_ELEMENTS
    for piece in _pieces(tensors):
        if piece.numel() > room:
            ends += torch.cat(batch).aminmax()
            batch, room = [], _PIECE_ELEMENTS
        batch.append(piece)
        room -= piece.numel()
    if batch:
        ends += torch.cat(batch).aminmax()
    return float(torch.stack([end.float() for end in ends]).abs().max()) if ends else 0.0


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All elements, flat."""
    for tensor in tensors:
        flat = tensor.reshape(-1)
        if tensor.numel() <= _PIECE_ELEMENTS:
            yield flat
        else:
            yield from torch.split(flat, _PIECE_ELEMENTS)
