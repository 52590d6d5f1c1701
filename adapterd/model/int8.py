"""A frozen linear in 8 bits: whole numbers by row, one scale for each row, and inputs as they are.

    w[j] ~ scales[j] * values[j]        scales[j] = max |w[j]| / 127

Only the weights are rounded, once, at load: a product is the sum of values * x in float32, then scaled. So a server of
an int8 base computes what PEFT computes over the same base with these weights written out, and adapters stay as they
are. Half the bytes of a 16-bit base: on a machine that waits for memory, nearly half the time of a step. On processors
without instructions for bfloat16, x of that type is multiplied as whole numbers of 16 bits (native/fixed.h says what
that may cost, and tests/model/test_int8.py holds it to it).
"""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_LARGEST = 127.0
_AT_A_TIME = 1 << 20
"""Weights that are rounded, and that the reference turns back to the input's type, at a time."""
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Last parts of paths that choose experts: small, and a rounding there changes which expert is asked."""

Int8Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(x [..., d_in], values int8 [d_out, d_in], bias [d_out] or None, scales float32 [d_out]) -> [..., d_out]."""


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values int8 [d_out, d_in], scales float32 [d_out]) of a weight [d_out, d_in]; a row of zeros has scale 1."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for part in _parts(*weight.shape):
        rows = weight[part].to(torch.float32, copy=True)
        scale = rows.abs().amax(1) / _LARGEST
        scale = torch.where(scale > 0, scale, 1.0)
        scales[part] = scale
        values[part] = rows.div_(scale[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    return values, scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that `values` and `scales` stand for, rounded to `dtype`."""
    return (values.float() * scales[:, None]).to(dtype)


def int8_linear(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor
) -> torch.Tensor:
    """The reference: products in float32 of x and the whole numbers, a few rows of them at a time."""
    d_out, d_in = values.shape
    rows = x.reshape(-1, d_in).float()
    y = torch.empty(rows.shape[0], d_out, dtype=torch.float32, device=x.device)
    for part in _parts(d_out, d_in):
        y[:, part] = F.linear(rows, values[part].float()) * scales[part]
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], d_out)


def _parts(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(_AT_A_TIME // max(num_columns, 1), 1)
    return (slice(start, start + step) for start in range(0, num_rows, step))


class Int8Linear(nn.Linear):
    """A linear whose weight is kept as `values` and `scales`; the module it is made from may be freed."""

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, product: Int8Product = int8_linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        values, scales = quantize_rows(linear.weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.bias = linear.bias
        self.product = product
        self.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # made when asked: nothing that serves asks
        """The weight that is multiplied, written out in the type of the base."""
        return dequantize_rows(self.values, self.scales, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Linear's
        return self.product(input, self.values, self.bias, self.scales)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


@torch.no_grad()
def quantize_linears(model: nn.Module) -> int:
    """Replace in place every linear but those that choose experts, the head too; returns how many bytes are saved.

    The embedding stays as it is, so a head that was tied to it has weights of its own from now on.
    """
    found = _to_be_rounded(model)
    before = _num_bytes(model)
    for path, linear in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Int8Linear(linear))
    saved = before - _num_bytes(model)
    logger.info("%d linears in 8 bits: %.1f MB less", len(found), saved / 1e6)
    return saved


@torch.no_grad()
def round_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Give, in place, each linear the weight that `quantize_linears` makes of it where the model is loaded in `dtype`.

    It is written out in the model's own type, float32 for a reference: whoever computes with the model computes on the
    numbers that an int8 base multiplies. A head that was tied to the embedding has weights of its own from now on.
    """
    for _, linear in _to_be_rounded(model):
        values, scales = quantize_rows(linear.weight.detach().to(dtype))
        rounded = dequantize_rows(values, scales, linear.weight.dtype)
        linear.weight = nn.Parameter(rounded, requires_grad=False)


def _to_be_rounded(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path.rpartition(".")[2] not in _ROUTERS
    ]


def _num_bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
