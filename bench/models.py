"""A base of a real model's shape with random weights, its tokenizer, and adapters for it, made on the spot.

Speed does not depend on what the weights say, only on their shapes and types; no hub is needed. Every token but
the single bytes is a whole word with its space, and greedy decoding never chooses a byte: so a text of n words is
n tokens, and each generated token is a chunk of visible text on any server.

    python -m bench.models --out OUT                             # OUT/base, OUT/adapters/adapter-00 .. -07
    python -m bench.models --out OUT --no-base --adapters-in adapters-ranks --ranks 8,16,32,64
    python -m bench.models --out OUT --shape llama-3-8b --adapters 32
    python -m bench.models --out OUT --shape qwen3-0.2b --adapters 2000 --ranks 8 --targets q_proj,v_proj

The last line of stdout is JSON: paths relative to OUT, and bytes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_RARE_TOKENS = len(SPECIAL_TOKENS) + 256
"""Ids below this are special tokens and single bytes; greedy decoding never chooses them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}

SHAPES: Mapping[str, Any] = {
    # Qwen3-0.6B but for its vocabulary of 151,936: at this size the head would be a quarter of every step.
    "qwen3-0.6b": lambda: Qwen3Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, **_IDS,
    ),
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, **_IDS,
    ),
    # The embedded base's shape, for benches of everything but the model.
    "mini": lambda: Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, **_IDS,
    ),
    # Large enough that a step is weights and not overhead, small enough for float32: answers are exact and can be
    # compared with PEFT's.
    "qwen3-0.2b": lambda: Qwen3Config(
        vocab_size=8_000, hidden_size=768, intermediate_size=2304, num_hidden_layers=24, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, **_IDS,
    ),
    "tiny": lambda: Qwen3Config(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True, **_IDS,
    ),
}  # fmt: skip


def config_of(shape: str, num_layers: int | None = None) -> Any:
    """One of SHAPES, cut to its first layers if `num_layers` is given."""
    config = SHAPES[shape]()
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    return config


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` entries: special tokens, bytes, syllables, and words of two syllables.

    All merges are consonant and vowel, space and syllable, space-syllable and syllable: no two compete for a
    letter, so every word of the vocabulary, after a space, is one token.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(tokens) == NUM_RARE_TOKENS
    merges: list[tuple[str, str]] = []
    for left, right in itertools.islice(_merges(), vocab_size - len(tokens)):
        merges.append((left, right))
        tokens.append(left + right)
    if len(tokens) < vocab_size:
        raise ValueError(
            f"the vocabulary can have {len(tokens)} entries at most; {vocab_size} were asked for"
        )
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL_TOKENS[2], pad_token=SPECIAL_TOKENS[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    consonants, vowels = "bcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ", "aeiouAEIOU"
    pairs = list(itertools.product(consonants, vowels))
    syllables = [consonant + vowel for consonant, vowel in pairs]
    space = "Ġ"  # what byte-level BPE writes for a space
    yield from pairs
    yield from ((space, syllable) for syllable in syllables)
    yield from ((space + first, second) for first, second in itertools.product(syllables, syllables))


def make_base(config: Any, directory: Path, seed: int = 0) -> int:
    """Write config, weights (bfloat16) and tokenizer below `directory`; returns the bytes of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(_on_meta(config)).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    make_tokenizer(config.vocab_size).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": config.eos_token_id}))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, meta in _on_meta(config).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = torch.ones(meta.shape, dtype=torch.bfloat16)
        if weight.dim() == 2:
            weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
        if weight.shape[0] == config.vocab_size:
            weight[:NUM_RARE_TOKENS] *= 1e-3
        weights[name] = weight
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.nbytes for weight in weights.values())


def make_adapter(
    linears: Mapping[str, tuple[int, int]], directory: Path, rank: int, seed: int, *, strength: float = 0.1
) -> int:
    """Write a PEFT directory over these linears, bfloat16; returns the bytes of its matrices.

    strength: the deviation of B times the root of the rank; 0.1 changes logits, 1 an answer from its first tokens on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for path, (d_out, d_in) in linears.items():
        a = torch.empty(rank, d_in, dtype=torch.bfloat16).normal_(0.0, d_in**-0.5, generator=generator)
        b = torch.empty(d_out, rank, dtype=torch.bfloat16).normal_(
            0.0, strength * rank**-0.5, generator=generator
        )
        matrices[f"base_model.model.{path}.lora_A.weight"] = a
        matrices[f"base_model.model.{path}.lora_B.weight"] = b
    save_file(matrices, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in linears}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(peft_config, indent=1) + "\n")
    return sum(matrix.nbytes for matrix in matrices.values())


def lora_linears(config: Any) -> dict[str, tuple[int, int]]:
    """Path -> (d_out, d_in) of every linear but the head."""
    model = _on_meta(config)
    head = model.get_output_embeddings()
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = SHAPES[arguments.shape]()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    linears = _targeted(lora_linears(config), arguments.targets)
    made = {} if arguments.no_base else {"base": make_base(config, arguments.out / "base", arguments.seed)}
    adapter_bytes = {
        f"{arguments.adapters_in}/adapter-{i:02}": make_adapter(
            linears,
            arguments.out / arguments.adapters_in / f"adapter-{i:02}",
            ranks[i % len(ranks)],
            arguments.seed + 1 + i,
        )
        for i in range(arguments.adapters)
    }
    print(json.dumps({"bench": "models", "shape": arguments.shape, **made, **adapter_bytes}))
    return 0


def _targeted(linears: dict[str, tuple[int, int]], targets: str) -> dict[str, tuple[int, int]]:
    """Those of these last names; all if none are named."""
    names = [name for name in targets.split(",") if name]
    return {path: shape for path, shape in linears.items() if not names or path.rpartition(".")[2] in names}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write below")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--adapters", type=int, default=8, help="how many")
    parser.add_argument("--ranks", default="16", help="one rank, or several that the adapters take in turn")
    parser.add_argument(
        "--targets", default="", help="last names of the linears, with commas (default: all but the head)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters-in", default="adapters", help="their directory below OUT")
    parser.add_argument("--no-base", action="store_true", help="only the adapters, for a base that is there")
    arguments = parser.parse_args(argv)
    if arguments.targets and not _targeted(lora_linears(SHAPES[arguments.shape]()), arguments.targets):
        parser.error(f"--targets {arguments.targets}: {arguments.shape} has no linear of such a name")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
