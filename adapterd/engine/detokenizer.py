"""Tokens to text as they come: half a character and what may become a stop string are held back. No torch.

Works from the table id -> bytes alone, so the engine thread never calls a tokenizer.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from adapterd.token_table import TokenTable


@dataclass(frozen=True)
class Vocabulary:
    """What turning tokens into text needs to know of the base's tokenizer."""

    table: TokenTable
    special_token_ids: frozenset[int]


@dataclass(frozen=True)
class TextDelta:
    """Text that is safe to show, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """The text of one sequence. `push` each output token, then `flush` once unless a stop string was found."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        continues_prompt: bool = False,
    ) -> None:
        self._token_bytes = vocabulary.table.token_bytes
        self._skipped = vocabulary.special_token_ids if skip_special_tokens else frozenset()
        # Such tokenizers drop one space at the start of a text; what continues a text does not start one.
        self._strip_next_space = vocabulary.table.strips_leading_space and not continues_prompt
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""  # decoded, not shown yet

    def push(self, token_id: int, *, check_stop: bool = True) -> TextDelta:
        """Add one token. With check_stop=False (below min_tokens) stop strings are shown like other text."""
        data = b"" if token_id in self._skipped else self._bytes_of(token_id)
        if self._strip_next_space and data:
            data = data.removeprefix(b" ")
            self._strip_next_space = False
        self._held += self._decoder.decode(data)
        return self._release(check_stop)

    def flush(self, *, check_stop: bool = True) -> TextDelta:
        """The rest, at the end: what was held back is shown, half a character as U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        delta = self._release(check_stop)
        if delta.stop is not None:
            return delta
        rest, self._held = delta.text + self._held, ""
        return TextDelta(rest)

    def _bytes_of(self, token_id: int) -> bytes:
        # A base's embedding may have more rows than its tokenizer has tokens; those rows say nothing.
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def _release(self, check_stop: bool) -> TextDelta:
        if check_stop:
            found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
            if found:
                at, stop = min(found, key=lambda hit: hit[0])
                text = self._held[: at + len(stop) if self._include_stop else at]
                self._held = ""
                return TextDelta(text, stop)
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        safe = len(self._held) - keep
        text, self._held = self._held[:safe], self._held[safe:]
        return TextDelta(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a later token could complete to `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
