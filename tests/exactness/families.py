"""Tiny random models of many families, adapters made by PEFT, and PEFT's own greedy answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **HEAD),
    "mistral": lambda: transformers.MistralConfig(**COMMON, **WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **HEAD, **WINDOW, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **HEAD, **WINDOW, layer_types=ALTERNATING),
    "phi3": lambda: transformers.Phi3Config(**COMMON, original_max_position_embeddings=256),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **COMMON, rope_parameters=LONGROPE, original_max_position_embeddings=64
    ),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    "granite": lambda: transformers.GraniteConfig(
        **COMMON, attention_multiplier=0.2, residual_multiplier=0.7, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "cohere2": lambda: transformers.Cohere2Config(**COMMON, **WINDOW, layer_types=ALTERNATING, logit_scale=1.0),
    "smollm3": lambda: transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1]),
    "glm4": lambda: transformers.Glm4Config(**COMMON, **HEAD),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, **HEAD, **WINDOW, layer_types=ALTERNATING, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**COMMON, **WINDOW),
    "exaone4": lambda: transformers.Exaone4Config(**COMMON, **WINDOW, layer_types=ALTERNATING),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, **HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8,
        moe_intermediate_size=32, first_k_dense_replace=1,
    ),
}  # fmt: skip

ATTENTION_ONLY = {"gpt-oss", "qwen3-moe", "mixtral", "deepseek-v3"}
"""Families whose feed-forward linears are expert parameters, not modules: adapters reach attention alone."""


@dataclass(frozen=True)
class Continuation:
    """PEFT's greedy answer, and the smallest distance between the likeliest two tokens on the way."""

    token_ids: tuple[int, ...]
    margin: float


class Reference:
    """transformers and PEFT, one sequence and one adapter at a time, in float32, without a cache."""

    def __init__(self, directory: Path, adapter: Path | None = None) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = PeftModel.from_pretrained(model, adapter) if adapter else model
        self._model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[num_tokens, vocab_size]"""
        found: torch.Tensor = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        return found

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> Continuation:
        token_ids = list(prompt)
        margin = float("inf")
        for _ in range(num_tokens):
            top = self.logits(token_ids)[-1].topk(2)
            margin = min(margin, (top.values[0] - top.values[1]).item())
            token_ids.append(int(top.indices[0]))
        return Continuation(tuple(token_ids[len(prompt) :]), margin)


def save_model(family: str, directory: Path, seed: int = 0) -> None:
    """A random model whose attention matters: initialisers leave weights so small that every token looks alike."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)


def save_adapter(
    base: Path, directory: Path, *, rank: int, targets: Sequence[str], seed: int, use_rslora: bool = False
) -> None:
    """An adapter made and written by PEFT, strong enough to change most answers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(targets),
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if "lora_B" in name:
                parameter.normal_(0.0, 0.15 * parameter.shape[-1] ** -0.5)
        peft_model.save_pretrained(directory)


def linear_names(base: Path, family: str) -> list[str]:
    """Last parts of the paths of the linears that adapters may change."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = model.get_output_embeddings()
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if family in ATTENTION_ONLY:
        names = {name for name in names if name.endswith("_proj")} - {"gate_proj", "up_proj", "down_proj"}
    return sorted(names)
