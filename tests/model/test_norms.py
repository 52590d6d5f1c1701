"""A family's RMSNorm is replaced where the one call computes the same, and only there."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from adapterd.model.norms import FusedRMSNorm, fused_norm, use_fused_norms
from adapterd.model.pointwise_cpu import native_rms_norm
from tests.exactness.families import FAMILIES
from tests.native_kernels import require_native_kernels

pytestmark = pytest.mark.usefixtures("several_threads")


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def random_weight(module: nn.Module) -> nn.Module:
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 32, 33, 128, 1024, 1100])
def test_is_the_formula_rounded_once(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    x = (3 * torch.randn(2, 7, size, generator=generator)).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 1)
    found = native_rms_norm(x, weight, 1e-5, 1.0)
    assert found.dtype == dtype
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=rounding)


@pytest.mark.parametrize(
    ("norm", "offset"), [(LlamaRMSNorm, 0.0), (Qwen3RMSNorm, 0.0), (Gemma2RMSNorm, 1.0)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_keep_their_weight_and_their_answers(
    norm: type[nn.Module], offset: float, dtype: torch.dtype
) -> None:
    module = random_weight(norm(96, eps=1e-3).to(dtype))
    found = fused_norm(module, native_rms_norm)
    assert found is not None
    assert found.weight is module.weight
    assert (found.eps, found.offset) == (1e-3, offset)
    x = torch.randn(5, 96).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # the families round twice in 16 bits
    torch.testing.assert_close(found(x), module(x), atol=tolerance, rtol=tolerance)


class CubicRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) ** 3


class EpsOutsideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-3)


@pytest.mark.parametrize(
    "module",
    [
        random_weight(CubicRMSNorm(96)),
        random_weight(EpsOutsideRMSNorm(96, eps=1e-3)),
        nn.LayerNorm(96),
        LlamaRMSNorm(96).half(),
        nn.RMSNorm(96),  # its eps is None: torch takes the type's own
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    assert fused_norm(module, native_rms_norm) is None


def test_every_norm_of_a_model_is_replaced_under_its_name() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3"]())
    names = list(model.state_dict())
    assert use_fused_norms(model, native_rms_norm) == 4 * model.config.num_hidden_layers + 1
    assert isinstance(model.model.norm, FusedRMSNorm)
    assert list(model.state_dict()) == names
