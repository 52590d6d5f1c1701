"""Log probabilities in the two dialects: a list of records for chat, parallel lists for completions."""

import codecs
from collections.abc import Sequence

from adapterd.core import TokenLogprobs
from adapterd.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

MIN_LOGPROB = -9999.0
"""JSON has no infinity; vLLM writes this number for a token of probability zero."""


def chat_logprobs(tokens: Sequence[TokenLogprobs], token_bytes: Sequence[bytes]) -> ChatLogprobs:
    """`token_bytes`: token id -> bytes."""
    content: list[TokenLogprob] = [
        {
            **_record(item.token_id, item.logprob, token_bytes),
            "top_logprobs": [_record(token, logprob, token_bytes) for token, logprob in item.top],
        }
        for item in tokens
    ]
    return {"content": content, "refusal": None}


def _record(token: int, logprob: float, token_bytes: Sequence[bytes]) -> TopLogprob:
    data = _bytes_of(token, token_bytes)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(data),
    }


def _bytes_of(token: int, token_bytes: Sequence[bytes]) -> bytes:
    """A checkpoint's vocabulary may be padded beyond its tokenizer's: such ids stand for nothing."""
    return token_bytes[token] if token < len(token_bytes) else b""


class CompletionLogprobsWriter:
    """Writes one answer's log probabilities, in one go or step by step; knows where in the text it is.

    `skipped` are the ids that the text leaves out: they take no room in it. `strips_leading_space`: the text
    lacks the space that its first token begins with.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], skipped: frozenset[int], *, strips_leading_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text_offset = 0
        self._strips_space = strips_leading_space

    def write_first(self, token: int) -> CompletionLogprobs:
        """The first token of an echoed prompt is predicted by nothing: its entries are null."""
        return {
            "text_offset": [self._advance(token)],
            "token_logprobs": [None],
            "tokens": [self._name(token)],
            "top_logprobs": [None],
        }

    def write(self, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        return {
            "text_offset": [self._advance(item.token_id) for item in logprobs],
            "token_logprobs": [max(item.logprob, MIN_LOGPROB) for item in logprobs],
            "tokens": [self._name(item.token_id) for item in logprobs],
            "top_logprobs": [self._top(item) for item in logprobs],
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float] | None:
        """The chosen token is always among them, as OpenAI has it: up to `logprobs` + 1 entries."""
        return {
            self._name(token): max(logprob, MIN_LOGPROB)
            for token, logprob in (*item.top, (item.token_id, item.logprob))
        }

    def _name(self, token: int) -> str:
        """A token that is a part of a character has its bytes for a name, so that no two share one."""
        data = _bytes_of(token, self._token_bytes)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _advance(self, token: int) -> int:
        """Characters of the text before `token`; a character that is not complete yet does not count."""
        offset = self._text_offset
        if token not in self._skipped:
            text = self._decoder.decode(_bytes_of(token, self._token_bytes))
            if self._strips_space:
                text = text.removeprefix(" ")
                self._strips_space = False
            self._text_offset += len(text)
        return offset


def extend(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "text_offset": first["text_offset"] + second["text_offset"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "tokens": first["tokens"] + second["tokens"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
    }
