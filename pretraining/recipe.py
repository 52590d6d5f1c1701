"""The numbers of the training, and what is built from them: the fresh model and its optimizers."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pretraining import tokenizer as tokenizers
from pretraining.muon import Muon


@dataclass(frozen=True)
class Recipe:
    """Every number of the training; the defaults made the shipped model."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 10000.0
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    user_weight: float = 0.1
    user_share: float = (
        0.25  # of the user tokens are scored, at user_weight / user_share: same mean, less head work
    )
    warmup_steps: int = 40
    decay_share: float = 0.3  # of the budget
    induction_cap: float = 0.25  # of the budget
    induction_length: int = 64
    induction_rows: int = 32
    row_length: int = 256
    row_count: int = 10
    steps_per_block: int = (
        10  # rows are generated and packed a block at a time; checkpoints fall between blocks
    )
    tokenizer_chats: int = 16000
    copy_gate: float = 0.95
    gate_steps: int = 100
    probe_steps: int = 400
    log_steps: int = 20


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh Qwen3 decoder. Output projections start at zero, so each block starts as the identity."""
    config = Qwen3Config(
        vocab_size=tokenizers.VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=tokenizers.MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(1.4)  # sharper attention from the first step: copying needs it
            elif parameter.ndim == 2 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def build_optimizers(recipe: Recipe, model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
