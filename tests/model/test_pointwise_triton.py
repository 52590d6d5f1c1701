"""Norms, gates and turns in Triton equal their formulas; widths that fill no block, rows that are no token."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.kv import KVPool, KVShape
from adapterd.model.norms import FusedRMSNorm
from tests.triton_kernels import DEVICE

from adapterd.model.pointwise_triton import (  # isort: skip  (needs the interpreter's setting)
    Heads,
    triton_rms_norm,
    triton_silu_mul,
    turn_and_write,
)

ROUNDING = {
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-7,  # the interpreter cuts it off
    torch.float16: 2.0**-10,
}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


@DTYPES
@pytest.mark.parametrize("size", [5, 64, 130, 4096])
def test_norm_is_the_formula_rounded_once(size: int, dtype: torch.dtype) -> None:
    x, weight = (3 * randn(2, 3, 2 * size)).to(dtype)[..., :size], randn(size, seed=1).to(dtype)
    found = triton_rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, 1.0).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), rms_norm(x, weight, 1e-5, 1.0), atol=2e-6, rtol=ROUNDING[dtype]
    )


@DTYPES
@pytest.mark.parametrize("size", [7, 64, 1500])
def test_gate_is_the_formula_rounded_once(size: int, dtype: torch.dtype) -> None:
    both = (10 * randn(5, 2 * size)).to(dtype).to(DEVICE)
    gate, up = both.tensor_split(2, dim=1)
    expected = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(
        triton_silu_mul(gate, up).double(), expected, atol=2e-6, rtol=2 * ROUNDING[dtype]
    )


@DTYPES
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_dim", "value_dim"), [(4, 2, 16, 16), (6, 6, 12, 20), (1, 1, 64, 8)]
)
@pytest.mark.parametrize("has_norms", [False, True])
def test_queries_are_turned_and_keys_and_values_written(
    num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    num_tokens, slots = 3, [17, -1, 2]
    widths = [num_heads * key_dim, num_kv_heads * key_dim, num_kv_heads * value_dim]
    qkv = randn(num_tokens, sum(widths)).to(dtype)
    angles = randn(num_tokens, key_dim // 2, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [
        FusedRMSNorm(nn.Parameter(randn(key_dim, seed=s).to(dtype).to(DEVICE)), 1e-5, 1.0, triton_rms_norm)
        for s in (2, 3)
    ]
    q_norm, k_norm = norms if has_norms else (None, None)
    pool = KVPool({4: KVShape(num_kv_heads, key_dim, value_dim)}, 2, dtype, DEVICE)
    before = pool.keys[4].clone()

    heads = Heads(num_heads, num_kv_heads, key_dim, value_dim, q_norm, k_norm)
    query = turn_and_write(
        qkv.clone().to(DEVICE),
        cos.to(DEVICE),
        sin.to(DEVICE),
        heads,
        pool,
        4,
        torch.tensor(slots, device=DEVICE),
    ).cpu()

    q, k, v = qkv.split(widths, dim=1)

    def turned(part: torch.Tensor, norm: FusedRMSNorm | None) -> torch.Tensor:
        rows = part.view(num_tokens, -1, key_dim).double()
        rows = rows if norm is None else rms_norm(rows, norm.weight.detach().cpu(), norm.eps, norm.offset)
        first, second = rows.tensor_split(2, dim=-1)
        return rows * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]

    tolerance = {"atol": 2e-6 if dtype == torch.float32 else 1e-3, "rtol": 2 * ROUNDING[dtype]}
    torch.testing.assert_close(query.double(), turned(q, q_norm), **tolerance)
    written = [row for row, slot in enumerate(slots) if slot >= 0]
    places = [slots[row] for row in written]
    torch.testing.assert_close(pool.keys[4].cpu().double()[places], turned(k, k_norm)[written], **tolerance)
    values = v.reshape(num_tokens, num_kv_heads, value_dim)
    assert torch.equal(pool.values[4].cpu()[places], values[written])
    others = [slot for slot in range(len(before)) if slot not in places]
    assert torch.equal(pool.keys[4][others], before[others])


def test_a_turn_of_half_a_head_is_not_taken() -> None:
    pool = KVPool({0: KVShape(1, 8, 8)}, 1, torch.float32, DEVICE)
    qkv, part = torch.zeros(1, 24, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="4 of 8 places"):
        turn_and_write(qkv, part, part, Heads(1, 1, 8, 8), pool, 0, torch.zeros(1, dtype=torch.long))
