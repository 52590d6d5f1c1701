"""Adapters of every kind in PEFT's dialect, made and written by PEFT itself over tiny random bases."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.exactness.families import COMMON, FAMILIES

BASES: dict[str, Any] = {
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=False),
    "qwen2-tied": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=160, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
    "gemma3": FAMILIES["gemma3"],
    "starcoder2": FAMILIES["starcoder2"],
    "phi3": FAMILIES["phi3"],
    "mixtral": FAMILIES["mixtral"],
    "qwen3-moe": FAMILIES["qwen3-moe"],
    "gpt-oss": FAMILIES["gpt-oss"],
}

ALL = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2": {
        "bias all": {"target_modules": ["q_proj"], "bias": "all"},
        "bias lora_only": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
        "lora_bias": {"target_modules": ALL, "lora_bias": True},
        "head": {"target_modules": ["lm_head", "q_proj"]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head and embedding alone": {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True},
        "saved head, embedding, norms": {
            "target_modules": ["v_proj"],
            "modules_to_save": ["lm_head", "embed_tokens", "norm"],
        },
        "saved mlp": {"target_modules": ["v_proj"], "modules_to_save": ["layers.1.mlp"]},
        "saved linear with its bias": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
        "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": list(range(3, 150, 2))},
        "tokens of both": {
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"embed_tokens": list(range(0, 90)), "lm_head": [1, 5, 90]},
        },
        "dora": {"target_modules": ALL, "use_dora": True},
        "dora of head and embedding": {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "use_dora": True},
        "dora with biases": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "bias": "all"},
        "parameters that are linears": {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
    },
    "qwen2-tied": {
        "head": {"target_modules": ["lm_head", "q_proj"]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head and embedding tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "saved embedding tied": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": list(range(3, 150, 2))},
        "tokens of both, different": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": list(range(90)), "lm_head": [1, 5, 90]},
        },
        "tokens of both, the same": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": list(range(90)), "lm_head": list(range(90))},
            "ensure_weight_tying": True,
        },
    },
    "gpt2": {
        "linears kept transposed": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        "dora": {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        "parameters kept transposed": {
            "target_modules": [],
            "target_parameters": ["attn.c_proj.weight", "c_fc.weight"],
        },
        "both embeddings": {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    },
    "gemma3": {
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "dora of the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        "saved embedding and norms": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "q_norm", "norm"],
        },
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": list(range(3, 150, 2))},
    },
    "starcoder2": {
        "biases of linears and norms": {"target_modules": ["q_proj"], "bias": "all"},
        "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]},
    },
    "phi3": {
        "fused": {"target_modules": ["qkv_proj", "gate_up_proj"]},
        "fused, dora": {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "use_dora": True},
    },
    "mixtral": {
        "experts": {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
        },
        "experts' last alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        "all-linear, with routers": {"target_modules": "all-linear"},
    },
    "qwen3-moe": {
        "experts": {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "saved routers": {"target_modules": ["o_proj"], "modules_to_save": ["mlp.gate"]},
        "routers' parameters": {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
    },
    "gpt-oss": {
        "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "biases, of routers too": {"target_modules": ["q_proj"], "bias": "all"},
    },
}  # fmt: skip


def save_base(name: str, directory: Path, seed: int = 0) -> None:
    """A random model whose attention and norms matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(BASES[name](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)


def save_peft(
    base: Path, directory: Path, *, seed: int, r: int = 4, untrained: bool = False, **config: Any
) -> None:
    """An adapter made and written by PEFT, everything that it trains moved far enough to change most answers.

    `untrained`: as PEFT begins it.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": r, "lora_alpha": 2 * r, "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weight tying, of embeddings that are saved
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in peft_model.named_parameters():
            if untrained or not parameter.requires_grad:
                continue
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            if "lora_A" in name or "lora_embedding_B" in name:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            elif ("lora_B" in name and parameter.dim() == 2) or "lora_embedding_A" in name:
                parameter.normal_(0.0, 0.3 * parameter.shape[-1 if "lora_B" in name else 0] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * max(spread, 0.1) * 0.7)
        peft_model.save_pretrained(directory)
