"""int8_linear on a CUDA device, in Triton: whole numbers become the input's type in registers, never in memory.

A decode step is bound by reading the weights: of them only 8 bits cross the bus. Same signature as int8.int8_linear.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adapterd.model.launch_triton import launch_options

_FEW_TOKENS = 16
"""Up to here a step waits for weights: narrow blocks of rows, so that every processor of a large chip has some."""


@triton.jit
def int8_linear_kernel(
    x,  # [num_tokens, d_in]
    values,  # int8 [d_out, d_in]
    scales,  # float32 [d_out]
    bias,  # [d_out], or anything if HAS_BIAS is not set
    y,  # [num_tokens, d_out]: written
    num_tokens,
    d_out,
    d_in,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y[t, j] = scales[j] * (x[t] . values[j]) + bias[j], summed in float32."""
    tokens = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    is_token, is_row = tokens < num_tokens, rows < d_out
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], dtype=tl.float32)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, d_in, BLOCK_IN):
        columns = start + tl.arange(0, BLOCK_IN)
        is_column = columns < d_in
        x_part = tl.load(
            x + tokens[:, None] * d_in + columns[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        whole = tl.load(
            values + rows[None, :] * d_in + columns[:, None],
            mask=is_row[None, :] & is_column[:, None],
            other=0,
        )
        # Every whole number of 8 bits is exact in bfloat16 and float16.
        weights = whole.to(tl.float32).to(x.dtype.element_ty)
        total = tl.dot(x_part, weights, total, input_precision=PRECISION)
    total *= tl.load(scales + rows, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    tl.store(y + tokens[:, None] * d_out + rows[None, :], total, mask=is_token[:, None] & is_row[None, :])


def int8_linear_triton(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor
) -> torch.Tensor:
    """x: [..., d_in], of any 16 or 32 bit type; values int8 [d_out, d_in]; scales float32 [d_out] -> [..., d_out]."""
    d_out, d_in = values.shape
    rows = x.reshape(-1, d_in).contiguous()
    y = torch.empty(rows.shape[0], d_out, dtype=x.dtype, device=x.device)
    few = rows.shape[0] <= _FEW_TOKENS
    block_tokens, block_out, block_in = (16, 16, 256) if few else (64, 64, 64)
    grid = (triton.cdiv(d_out, block_out), triton.cdiv(rows.shape[0], block_tokens))
    if rows.shape[0]:
        int8_linear_kernel[grid](
            rows,
            values,
            scales,
            scales if bias is None else bias,
            y,
            rows.shape[0],
            d_out,
            d_in,
            HAS_BIAS=bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            BLOCK_TOKENS=block_tokens,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            **launch_options(x.device),
        )
    return y.view(*x.shape[:-1], d_out)
