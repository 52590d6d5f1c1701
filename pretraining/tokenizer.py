"""The tokenizer of `mini`: byte-level BPE of 2048 tokens, digits one by one, ChatML turns.

A number such as 132/84 is six tokens whatever stands before it, so that copying a number is copying tokens. Any text is
representable (256 byte tokens). Saved as an ordinary transformers tokenizer directory.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
MAX_LENGTH = 1024
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# A digit alone | a word with the space before it | punctuation with the space before it | white space.
SPLIT = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The generation marks let a trainer ask transformers which tokens are the assistant's (the closing mark among them).
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('mini knows the roles system, user and assistant, not ' ~ message['role']) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] ~ '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}"
    "{{- message['content'] ~ '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` (ChatML or plain); deterministic for the same texts in the same order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_transformers(tokenizer)


def load(directory: Path) -> PreTrainedTokenizerFast:
    """What `save` wrote, with nothing added: saved again, the files are the same."""
    return _as_transformers(Tokenizer.from_file(str(directory / "tokenizer.json")))


def _as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer, its chat template and the generation defaults to `directory`."""
    tokenizer.save_pretrained(directory)
    defaults = {
        "eos_token_id": [
            tokenizer.convert_tokens_to_ids(IM_END),
            tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        ],
        "pad_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        "do_sample": False,
    }
    (directory / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")


def whole_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The words of four letters or more that are one token after a space."""
    tokens = (str(tokenizer.decode([index])) for index in range(len(tokenizer)))
    return [token[1:] for token in tokens if token.startswith(" ") and token[1:].isalpha() and len(token) > 4]
