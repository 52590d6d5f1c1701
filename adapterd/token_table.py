"""What a fast tokenizer is made of: the bytes behind each token id, and a fingerprint of its vocabulary.

Works on the parsed `tokenizer.json`; encodes nothing and renders nothing (see `render.py`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterd.errors import BaseRefused

_MAX_SAME_FILES = 1000


@dataclass(frozen=True)
class TokenTable:
    """`token_bytes[i]` is what token i adds to a text; b"" for ids that no token has.

    `strips_leading_space`: the tokenizer's own decoder drops one space at the start of a whole text
    (SentencePiece's dummy prefix), so joined bytes keep one space more there.
    """

    token_bytes: tuple[bytes, ...]
    strips_leading_space: bool


@dataclass(frozen=True)
class TokenizerIdentity:
    """The base's tokenizer, to compare an adapter's own with: fingerprints, and token -> id."""

    fingerprints: frozenset[str]
    token_ids: Mapping[str, int]
    _same_files: set[bytes] = field(default_factory=set, compare=False, repr=False)

    def is_same(self, file: bytes, parse: Callable[[bytes], Mapping[str, Any]]) -> bool:
        """Whether a tokenizer.json is this tokenizer's. Raises what `parse` raises, and KeyError, TypeError,
        IndexError or AttributeError for one that is none.

        Thousands of adapters bring the same few files, and parsing one of 150,000 tokens takes half a second: those
        that were found to be the same are known by their hash from then on.
        """
        digest = hashlib.sha256(file).digest()
        if digest in self._same_files:
            return True
        if tokenizer_fingerprint(parse(file)) not in self.fingerprints:
            return False
        if len(self._same_files) < _MAX_SAME_FILES:
            self._same_files.add(digest)
        return True


def build_token_table(tokenizer: Mapping[str, Any]) -> TokenTable:
    """The table of a parsed tokenizer.json; BaseRefused if its decoder does not work token by token.

    Two forms are known: byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as a printable character;
    SentencePiece's (Llama 2, Gemma, Mistral) writes a space as U+2581 and stray bytes as `<0xAB>`.
    """
    tokens = {token_id: token for token, token_id in _model_vocabulary(tokenizer)}
    tokens.update({added["id"]: added["content"] for added in tokenizer["added_tokens"]})
    decoder = _Decoder(tokenizer.get("decoder"))
    size = max(tokens) + 1
    table = tuple(decoder.bytes_of(tokens[i]) if i in tokens else b"" for i in range(size))
    return TokenTable(table, decoder.strips_leading_space)


def tokenizer_fingerprint(tokenizer: Mapping[str, Any]) -> str:
    """sha256 over vocabulary, merges and added tokens; their order and layout are ignored."""
    merges = [
        merge.split(" ", 1) if isinstance(merge, str) else list(merge)
        for merge in tokenizer["model"].get("merges", ())
    ]
    added = sorted(
        (token["id"], token["content"], bool(token["special"])) for token in tokenizer["added_tokens"]
    )
    vocabulary = sorted((token_id, token) for token, token_id in _model_vocabulary(tokenizer))
    content = json.dumps([vocabulary, merges, added], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _model_vocabulary(tokenizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        return list(vocabulary.items())
    return [(entry[0], token_id) for token_id, entry in enumerate(vocabulary)]  # Unigram: [token, score]


class _Decoder:
    """The tokenizer's decoder, read as a function of one token."""

    def __init__(self, spec: Mapping[str, Any] | None) -> None:
        self.strips_leading_space = False
        self._byte_level: dict[str, int] | None = None
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        for step in _flatten(spec):
            self._add(step)

    def _add(self, step: Mapping[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = _byte_level_alphabet()
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                self._replacements.append((pattern, content))
            case {"type": "Metaspace", "replacement": str(replacement)}:
                self._replacements.append((replacement, " "))
                self.strips_leading_space |= step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self.strips_leading_space |= start == 1
            case {"type": "Fuse"}:
                pass
            case _:
                raise BaseRefused(
                    f"the base's tokenizer decodes with {json.dumps(step)}, which does not map each token to"
                    " its own bytes; byte-level BPE and SentencePiece-style tokenizers are supported"
                )

    def bytes_of(self, token: str) -> bytes:
        if self._byte_level is not None:
            # As the library does it: a token with one character outside the alphabet stands for itself.
            mapped = [self._byte_level.get(character) for character in token]
            if None in mapped:
                return token.encode()
            return bytes(byte for byte in mapped if byte is not None)
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.encode()


def _flatten(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        raise BaseRefused(
            "the base's tokenizer.json has no decoder, so tokens cannot be joined into text exactly"
        )
    if spec.get("type") == "Sequence":
        return [step for part in spec["decoders"] for step in _flatten(part)]
    return [spec]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
