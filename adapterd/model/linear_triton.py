"""A linear for a few tokens on a CUDA device, in Triton: a decode step waits for weights, so they stream.

Each program owns some rows of the weight, or a part of them along d_in; its first weights are on their way before the
kernel in front has ended. The parts of a row are summed by whichever program comes last, in a fixed order, so the
result does not depend on who that is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_TOKENS = 64
"""For more, products are bound by arithmetic rather than by weights, and the vendor's library is better."""


@triton.jit
def few_tokens_linear_kernel(
    x,  # [num_tokens, d_in]
    weight,  # [d_out, d_in]
    bias,  # [d_out], or anything if HAS_BIAS is not set
    y,  # [num_tokens, d_out]: written, or added to if ADDS
    partial,  # float32 [NUM_SPLITS, num_blocks, BLOCK_OUT, BLOCK_TOKENS]: written if there are splits
    counts,  # int32 [num_blocks]: zeros, before and after
    num_tokens,
    d_out,
    d_in,
    part,
    x_stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y[t, j] = x[t] . weight[j] + bias[j], in float32. `part` of d_in is one split's, a multiple of BLOCK_IN."""
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    tokens = tl.arange(0, BLOCK_TOKENS)
    columns = split * part + tl.arange(0, BLOCK_IN)
    is_row, is_token = (rows < d_out)[:, None], (tokens < num_tokens)[None, :]
    w_places = weight + rows[:, None].to(tl.int64) * d_in + columns[None, :]
    x_places = x + tokens[None, :] * x_stride + columns[:, None]
    w_part = tl.load(w_places, mask=is_row, other=0.0)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    x_part = tl.load(x_places, mask=is_token, other=0.0)
    total = tl.dot(w_part, x_part, input_precision=PRECISION)
    for start in range(BLOCK_IN, part, BLOCK_IN):
        w_part = tl.load(w_places + start, mask=is_row, other=0.0)
        x_part = tl.load(x_places + start, mask=is_token, other=0.0)
        total = tl.dot(w_part, x_part, total, input_precision=PRECISION)
    is_last = True
    if NUM_SPLITS > 1:
        inner = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_TOKENS + tokens[None, :]
        stride = tl.num_programs(0) * BLOCK_OUT * BLOCK_TOKENS
        own = partial + block * BLOCK_OUT * BLOCK_TOKENS + inner
        tl.store(own + split * stride, total)
        tl.debug_barrier()
        is_last = tl.atomic_add(counts + block, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], dtype=tl.float32)
            for other in range(NUM_SPLITS):
                total += tl.load(own + other * stride, cache_modifier=".cg")
            tl.store(counts + block, 0)
    if is_last:
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=rows < d_out, other=0.0).to(tl.float32)[:, None]
        y_places = y + tokens[None, :] * y_stride + rows[:, None]
        if ADDS:
            total += tl.load(y_places, mask=is_row & is_token, other=0.0).to(tl.float32)
        tl.store(y_places, total.to(y.dtype.element_ty), mask=is_row & is_token)


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts a product; part of d_in a program at a time, `num_splits` programs a row."""

    block_out: int
    block_in: int
    num_splits: int
    num_stages: int = 4
    num_warps: int = 4


class FewTokensLinear:
    """The kernel with what it needs on a device. It belongs to one stream."""

    def __init__(self, device: torch.device, *, chained: bool) -> None:
        """chained: launches begin while the kernel in front still runs (compute capability 9.0 and up)."""
        self._counts = torch.zeros(1 << 14, dtype=torch.int32, device=device)
        self._chained = chained

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        tiling: Tiling,
        *,
        adds: bool,
    ) -> None:
        """y = x @ weight.T + bias in place, or y += that if `adds`.

        x: [num_tokens, d_in], at most MAX_TOKENS; weight: [d_out, d_in], d_in a multiple of block_in * num_splits;
        y: [num_tokens, d_out]; all of one float type.
        """
        num_tokens, d_in = x.shape
        d_out = len(weight)
        num_blocks = triton.cdiv(d_out, tiling.block_out)
        block_tokens = max(triton.next_power_of_2(num_tokens), 16)
        assert d_in % (tiling.block_in * tiling.num_splits) == 0
        assert num_blocks <= len(self._counts)
        partial = self._counts
        if tiling.num_splits > 1:
            size = tiling.num_splits * num_blocks * tiling.block_out * block_tokens
            partial = torch.empty(size, dtype=torch.float32, device=x.device)
        few_tokens_linear_kernel[(num_blocks, tiling.num_splits)](
            x, weight, weight if bias is None else bias, y, partial, self._counts,
            num_tokens, d_out, d_in, d_in // tiling.num_splits, x.stride(0), y.stride(0),
            HAS_BIAS=bias is not None, ADDS=adds, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            CHAINED=self._chained, NUM_SPLITS=tiling.num_splits, BLOCK_TOKENS=block_tokens,
            BLOCK_OUT=tiling.block_out, BLOCK_IN=tiling.block_in,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages, launch_pdl=self._chained,
        )  # fmt: skip
