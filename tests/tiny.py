"""Tiny models and tokenizers that the tests make on the spot: real files, random weights, no network."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterd.core import BaseSpec

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [
    "The parcel has not arrived and I would like my money back, please.",
    "Category: Shipping Priority: High Sentiment: Angry",
    "Hello there, how are you today? I am fine; thank you, café naïve 日本語 😀.",
    "Order 12345 was charged twice on the 3rd of May, for 19.99 each time.",
] * 8


def byte_level_tokenizer(
    *, chat_template: str | None = CHATML, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, with ChatML's tokens and template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def sentencepiece_tokenizer(*, strip: bool) -> PreTrainedTokenizerFast:
    """Llama 2's kind (`strip`) or Gemma's: spaces as U+2581, `<0xAB>` for stray bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in _TEXT],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    learnt = trained.get_vocab()
    order = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    order += [token for token in sorted(learnt, key=lambda token: learnt[token]) if token not in order]
    merges = [tuple(merge) for merge in _merges_of(trained)]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(order)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if strip else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def tiny_llama(directory: Path, *, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with its tokenizer, saved to `directory`; hidden 32, 4 heads of which 2 hold keys."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def spec_of(model: torch.nn.Module, *, name: str = "tiny", eos_token_ids: Iterable[int] = (2,)) -> BaseSpec:
    """What `model/base.py` says of a base: every linear but the head takes adapters."""
    return BaseSpec(
        name=name,
        root=name,
        architecture="LlamaForCausalLM",
        dtype="float32",
        vocab_size=model.config.vocab_size,
        max_model_len=256,
        lora_targets={
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and path != "lm_head"
        },
        eos_token_ids=frozenset(eos_token_ids),
    )


def _merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
