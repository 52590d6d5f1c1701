"""The largest value of many tensors is found wherever it lies, and what is no number is not lost."""

import math
from collections.abc import Sequence

import pytest
import torch

from adapterd.peaks import peak_of

SHAPES = [(3, 5), (40_000,), (7,), (200, 400), (32_000,), (1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_the_peak_is_found_in_any_tensor_and_at_its_end(where: int, dtype: torch.dtype) -> None:
    tensors = [torch.rand(shape).to(dtype) for shape in SHAPES]
    tensors[where].view(-1)[-1] = -200.0
    assert peak_of(tensors) == 200.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shapes", [SHAPES, [(2, 2)]])
def test_what_is_no_number_is_the_peak(value: float, shapes: Sequence[tuple[int, ...]]) -> None:
    tensors = [torch.rand(shape) for shape in shapes]
    tensors[-1].view(-1)[0] = value
    assert not math.isfinite(peak_of(tensors))


def test_types_may_differ_and_nothing_has_no_peak() -> None:
    assert peak_of([torch.tensor([1.0]), torch.tensor([[3.0]]).bfloat16().T]) == 3.0
    assert peak_of([]) == 0.0
