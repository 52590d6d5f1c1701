"""Families that cannot be exact are refused at load, by name: state outside attention, keywords not passed on."""

from pathlib import Path

import pytest
import transformers
from transformers import AutoModelForCausalLM

from adapterd.errors import BaseRefused
from adapterd.model.base import load_base
from tests.exactness.families import COMMON

REFUSED = {
    "lfm2": lambda: transformers.Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"]),
    "mamba2": lambda: transformers.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=2, vocab_size=160
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "stablelm": lambda: transformers.StableLmConfig(**COMMON),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=160),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_family_that_cannot_be_exact_is_refused_by_name(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(REFUSED[family]())
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseRefused, match=r"(?i)" + family.replace("_", "_?")):
        load_base(str(tmp_path), dtype="float32", device="cpu")
