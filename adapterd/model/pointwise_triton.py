"""What stands between a decoder's linears on a CUDA device, in Triton: RMSNorm, the gate of an MLP, and from the
product of q, k and v to turned queries and written keys and values. Each is one launch, sums in float32, rounded once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adapterd.model.kv import KVPool
from adapterd.model.launch_triton import launch_options
from adapterd.model.norms import FusedRMSNorm

_HEADS_PER_PROGRAM = 4


@triton.jit
def rms_norm_kernel(
    x, weight, y, num_columns, x_stride, eps, offset, CHAINED: tl.constexpr, BLOCK: tl.constexpr
):
    """y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * (weight + offset)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < num_columns
    factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    line = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(line * line, 0) / num_columns
    result = line * (1.0 / tl.sqrt(mean + eps)) * factors
    tl.store(y + row * num_columns + columns, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(
    gate, up, y, num_columns, gate_stride, up_stride, CHAINED: tl.constexpr, BLOCK: tl.constexpr
):
    """y[row] = gate[row] * sigmoid(gate[row]) * up[row]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    a = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    # Of a large negative number the plain formula would overflow.
    e = tl.exp(-tl.abs(a))
    result = a * tl.where(a >= 0, 1.0, e) / (1.0 + e) * b
    tl.store(y + row * num_columns + columns, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _turned_heads(
    line,
    heads,
    num_heads,
    weight,
    eps,
    offset,
    cos,
    sin,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """(first half, second half) of some heads of one token, normed and turned. line: where its heads begin."""
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    inside = columns < HALF
    mask = (heads < num_heads) & inside
    first = tl.load(line + heads * 2 * HALF + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(line + heads * 2 * HALF + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
        first_factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
        second_factors = tl.load(weight + HALF + columns, mask=inside, other=0.0).to(tl.float32) + offset
        first = first * scale[:, None] * first_factors
        second = second * scale[:, None] * second_factors
    cos_first = tl.load(cos + columns, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + columns, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def turn_and_write_kernel(
    qkv,  # [num_tokens, NUM_HEADS * 2 HALF + NUM_KV_HEADS * (2 HALF + VALUE_DIM)]: queries are changed in place
    cos,  # [num_tokens, 2 HALF]
    sin,
    q_weight,
    k_weight,
    keys,  # [num_slots, NUM_KV_HEADS, 2 HALF]: written
    values,  # [num_slots, NUM_KV_HEADS, VALUE_DIM]: written
    slot_mapping,  # int64 [num_tokens]; below 0: nowhere
    qkv_stride,
    q_eps,
    q_offset,
    k_eps,
    k_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Rotary embedding of one token's queries, or of its keys, which go with its values to the token's slot."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_blocks = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    line = qkv + token * qkv_stride
    cos += token * 2 * HALF
    sin += token * 2 * HALF
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if block < query_blocks:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        first, second = _turned_heads(
            line, heads, NUM_HEADS, q_weight, q_eps, q_offset, cos, sin, HALF, HAS_NORM, BLOCK_HALF
        )
        mask = (heads < NUM_HEADS) & (columns < HALF)
        place = line + heads * 2 * HALF + columns
        tl.store(place, first.to(qkv.dtype.element_ty), mask=mask)
        tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            heads = (block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
            line += NUM_HEADS * 2 * HALF
            first, second = _turned_heads(
                line, heads, NUM_KV_HEADS, k_weight, k_eps, k_offset, cos, sin, HALF, HAS_NORM, BLOCK_HALF
            )
            mask = (heads < NUM_KV_HEADS) & (columns < HALF)
            place = keys + (slot * NUM_KV_HEADS + heads) * 2 * HALF + columns
            tl.store(place, first.to(keys.dtype.element_ty), mask=mask)
            tl.store(place + HALF, second.to(keys.dtype.element_ty), mask=mask)
            value_columns = tl.arange(0, BLOCK_VALUE)[None, :]
            mask = (heads < NUM_KV_HEADS) & (value_columns < VALUE_DIM)
            line += NUM_KV_HEADS * 2 * HALF
            value = tl.load(line + heads * VALUE_DIM + value_columns, mask=mask)
            tl.store(values + (slot * NUM_KV_HEADS + heads) * VALUE_DIM + value_columns, value, mask=mask)


def triton_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """As norms.RMSNormFunction. x: [..., n]; weight: [n]; any float types."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, num_columns = rows.shape
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        rms_norm_kernel[(num_rows,)](
            rows, weight, y, num_columns, rows.stride(0), eps, offset, BLOCK=block,
            **launch_options(x.device),
            num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return y


def triton_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As mlps.SiluMulFunction. gate, up: [..., n], their last dimension side by side in memory."""
    num_columns = gate.shape[-1]
    gates, ups = gate.reshape(-1, num_columns), up.reshape(-1, num_columns)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if len(gates):
        block = min(triton.next_power_of_2(num_columns), 1024)
        silu_mul_kernel[(len(gates), triton.cdiv(num_columns, block))](
            gates, ups, y, num_columns, gates.stride(0), ups.stride(0), BLOCK=block,
            **launch_options(gate.device), num_warps=4,
        )  # fmt: skip
    return y


@dataclass(frozen=True)
class Heads:
    """num_heads of queries, num_kv_heads of keys [key_dim] and of values [value_dim]; both norms or neither."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    q_norm: FusedRMSNorm | None = None
    k_norm: FusedRMSNorm | None = None


def turn_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    pool: KVPool,
    layer: int,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Norm and turn queries and keys, write keys and values to the pool; queries [num_tokens, num_heads, key_dim].

    qkv: [num_tokens, all heads side by side], changed in place, which is where the queries stay; cos, sin:
    [num_tokens, key_dim]; slot_mapping: int64 [num_tokens], below 0 for a row that is written nowhere. The turn is
    that of Llama: a head's first half with its second. Raises RuntimeError if only a part of a head is turned.
    """
    num_tokens = qkv.shape[0]
    if cos.shape[-1] != heads.key_dim:
        raise RuntimeError(f"{cos.shape[-1]} of {heads.key_dim} places are turned; only whole heads can be")
    q_norm, k_norm = heads.q_norm, heads.k_norm
    half = heads.key_dim // 2
    block_heads = min(_HEADS_PER_PROGRAM, triton.next_power_of_2(heads.num_heads))
    num_blocks = triton.cdiv(heads.num_heads, block_heads) + triton.cdiv(heads.num_kv_heads, block_heads)
    turn_and_write_kernel[(num_tokens, num_blocks)](
        qkv, cos, sin,
        qkv if q_norm is None else q_norm.weight, qkv if k_norm is None else k_norm.weight,
        pool.keys[layer], pool.values[layer], slot_mapping, qkv.stride(0),
        0.0 if q_norm is None else q_norm.eps, 0.0 if q_norm is None else q_norm.offset,
        0.0 if k_norm is None else k_norm.eps, 0.0 if k_norm is None else k_norm.offset,
        NUM_HEADS=heads.num_heads, NUM_KV_HEADS=heads.num_kv_heads, HALF=half, VALUE_DIM=heads.value_dim,
        HAS_NORM=q_norm is not None, BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_VALUE=triton.next_power_of_2(heads.value_dim), **launch_options(qkv.device), num_warps=2,
    )  # fmt: skip
    return qkv[:, : heads.num_heads * heads.key_dim].view(num_tokens, heads.num_heads, heads.key_dim)
