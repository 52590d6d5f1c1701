"""Messages to tokens and back: the one renderer of the server, of training and of evaluation.

What a model is trained on and what it is asked are the same ids because they come out of the same function.
Safe to call from many threads: nothing here changes after `load`.
"""

import hashlib
import inspect
import json
import random
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jinja2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from adapterd.errors import BaseRefused, InvalidRequest
from adapterd.token_table import TokenizerIdentity, TokenTable, build_token_table, tokenizer_fingerprint

_T = TypeVar("_T")

_PROBE_TEXT = "Café naïve — 12,345 ✓ 日本語 😀\n\tA b  c   'd' <e> f_g(h); Hello world"


class Renderer:
    """One base's tokenizer and chat template, and the table from token ids to bytes.

    token_bytes: id -> bytes, b"" for ids that decode to nothing; checked against the tokenizer's decoding.
    special_token_ids: ids that `skip_special_tokens` leaves out of a text.
    stop_token_id: what ends an assistant's turn; training appends it and serving stops on it.
    eos_token_ids: every id the base ends on; holds `stop_token_id`.
    strips_leading_space: `decode` drops one space at the start of a text that `token_bytes` keep.
    identity: what an adapter's own tokenizer files are compared with.
    """

    def __init__(
        self, tokenizer: Any, *, eos_token_ids: frozenset[int], file_fingerprint: str | None = None
    ) -> None:
        """`tokenizer`: a transformers fast tokenizer. BaseRefused if tokens do not match text exactly."""
        if not getattr(tokenizer, "is_fast", False):
            raise BaseRefused(
                f"the base's tokenizer is {type(tokenizer).__name__}, which has no tokenizer.json; only fast"
                " tokenizers are supported (convert it with transformers' save_pretrained)"
            )
        self._tokenizer = tokenizer
        # The template is given the special tokens under these names, and transformers lets arguments go before them.
        self._own_arguments = frozenset(
            {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
        )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        parsed = json.loads(self._backend.to_str())
        table = build_token_table(parsed)
        self.token_bytes: tuple[bytes, ...] = table.token_bytes
        self.strips_leading_space: bool = table.strips_leading_space
        self.special_token_ids: frozenset[int] = frozenset(
            token["id"] for token in parsed["added_tokens"] if token["special"]
        )
        special = sorted((token["content"] for token in parsed["added_tokens"] if token["special"]), key=len)
        # The longest first, so that one that begins another does not take its place.
        self._special_texts = re.compile("|".join(map(re.escape, reversed(special)))) if special else None
        self._check_table(table)
        fingerprints = {tokenizer_fingerprint(parsed)}
        if file_fingerprint is not None:
            fingerprints.add(file_fingerprint)
        self.identity = TokenizerIdentity(
            frozenset(fingerprints), MappingProxyType(self._backend.get_vocab(True))
        )
        self.stop_token_id: int = self._find_stop_token(eos_token_ids)
        self.eos_token_ids: frozenset[int] = eos_token_ids | {self.stop_token_id}

    @classmethod
    def load(cls, directory: Path) -> "Renderer":
        """Read the tokenizer, template and end-of-sequence ids in `directory`. Imports no code from it."""
        if not (directory / "tokenizer.json").is_file():
            raise BaseRefused(
                f"{directory} has no tokenizer.json; only fast tokenizers are supported"
                " (convert the tokenizer with transformers' save_pretrained)"
            )
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        eos = {tokenizer.eos_token_id} - {None}
        for name in ("config.json", "generation_config.json"):
            eos |= read_eos_token_ids(directory / name) or set()
        file = json.loads((directory / "tokenizer.json").read_bytes())
        return cls(tokenizer, eos_token_ids=frozenset(eos), file_fingerprint=tokenizer_fingerprint(file))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The base's; of several named ones the default."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return str(template) if template else None

    @cached_property
    def template_sha256(self) -> str:
        """What tells one chat template from another; of no template, that of the empty text."""
        return hashlib.sha256(str(self._tokenizer.chat_template or "").encode()).hexdigest()

    def render_text(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The text a chat becomes, before it is tokens. `chat_template` replaces the base's.

        Raises InvalidRequest if there is no template, if the template refuses the messages, or if
        `template_kwargs` sets a special token or another argument that is not the request's to set.
        """
        if not messages:
            raise InvalidRequest("messages is empty; a chat needs at least one message", param="messages")
        if chat_template is None and not self.has_chat_template:
            raise InvalidRequest(
                "the base has no chat template and the adapter brings none; use /v1/completions instead",
                param="messages",
            )
        taken = sorted(self._own_arguments.intersection(template_kwargs or ()))
        if taken:
            raise InvalidRequest(f"{taken[0]!r} cannot be set by the request", param="chat_template_kwargs")
        options = {
            "chat_template": chat_template,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
            **(template_kwargs or {}),
        }
        plain = [dict(message) for message in messages]
        try:
            return self._apply_template(plain, options)
        except InvalidRequest:
            # Most templates write a call's arguments as JSON; some paste what they are given, and want text
            # there, and an empty text where the words of such a message are missing.
            if not any(message.get("tool_calls") for message in plain):
                raise
            return self._apply_template([_with_text_arguments(message) for message in plain], options)

    def _apply_template(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except jinja2.exceptions.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InvalidRequest(
                f"the chat template failed on the messages: {reason}", param="messages"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The only way messages become tokens. Special tokens come from the template alone.

        A message, tool or argument that spells one out (`<|im_end|>`) gets the ordinary tokens of its letters: who
        writes it cannot end it and speak in another role.
        """
        quoted = _Quotation(self._special_texts)
        text = self.render_text(
            [quoted.hide(message) for message in messages],
            chat_template=chat_template,
            tools=quoted.hide(tools),
            add_generation_prompt=add_generation_prompt,
            template_kwargs=quoted.hide(template_kwargs),
        )
        return self._encode_quoted(quoted, text)

    def encode(self, text: str) -> list[int]:
        """A raw prompt, with the special tokens this tokenizer adds by itself."""
        return self._encode(text, add_special_tokens=True, param="prompt")

    def encode_answer(self, text: str) -> list[int]:
        """The text of an answer, nothing added and nothing special; training appends `stop_token_id`."""
        literal = self._special_texts is not None and self._special_texts.search(text) is not None
        return self._encode(text, add_special_tokens=False, param="messages", literal=literal)

    def encode_calls(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """How the base says the last of `messages`, an assistant's with tool calls; the token that ends it included.

        The template has words of its own for calls. What it writes where a plain answer would stand is taken:
        an empty thinking block that it puts before every answer is no part of either.
        Raises InvalidRequest if the template leaves a call out.
        """
        quoted = _Quotation(self._special_texts)
        *before, last = (quoted.hide(message) for message in messages)
        quoted_tools, quoted_kwargs = quoted.hide(tools), quoted.hide(template_kwargs)

        def text_of(answer: Mapping[str, object]) -> str:
            return self.render_text(
                [*before, answer],
                chat_template=chat_template,
                tools=quoted_tools,
                add_generation_prompt=False,
                template_kwargs=quoted_kwargs,
            )

        head, _, _ = text_of({"role": "assistant", "content": quoted.mark}).partition(quoted.mark)
        said = text_of(last)
        if not said.startswith(head):
            head = head.rstrip()  # Mistral's: a space before words, none before a call
        names = [call["function"]["name"] for call in last["tool_calls"]]
        if not said.startswith(head) or not all(name in said[len(head) :] for name in names):
            raise InvalidRequest(
                f"the chat template does not write the tool calls of an answer ({', '.join(names)});"
                " take a base whose template knows tools",
                param="messages",
            )
        ids = self._encode_quoted(quoted, said[len(head) :])
        end = next((at for at, token in enumerate(ids) if token in self.eos_token_ids), None)
        return [*ids, self.stop_token_id] if end is None else ids[: end + 1]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The tokenizer's own decoding, without its optional tidying of spaces before punctuation."""
        return str(_guarded(lambda: self._backend.decode(list(ids), skip_special_tokens), "token_ids"))

    @cached_property
    def _literal_backend(self) -> Tokenizer:
        """The tokenizer that knows no special tokens; made when somebody first spells one out."""
        literal = Tokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal

    def _encode_quoted(self, quoted: "_Quotation", text: str) -> list[int]:
        ids: list[int] = []
        for piece, is_literal in quoted.split(text):
            ids += self._encode(piece, add_special_tokens=False, param="messages", literal=is_literal)
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool, param: str, literal: bool = False) -> list[int]:
        # The backend is called directly: transformers' wrapper writes truncation settings into it on each
        # call, which races between threads.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "the text holds a lone surrogate, which is no Unicode text", param=param
            ) from error
        backend = self._literal_backend if literal else self._backend
        encoding = _guarded(lambda: backend.encode(text, add_special_tokens=add_special_tokens), param)
        return list(encoding.ids)

    def _find_stop_token(self, eos_token_ids: frozenset[int]) -> int:
        """The special token that the template puts after an answer; failing that, the tokenizer's own end."""
        if self.has_chat_template:
            mark = "adapterd-answer"
            chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
            try:
                tail = self.render_text(chat, add_generation_prompt=False).rpartition(mark)[2]
            except InvalidRequest as error:
                raise BaseRefused(
                    f"the base's chat template cannot render a question and its answer: {error}"
                ) from error
            ids = self._encode(tail, add_special_tokens=False, param="messages")
            after = [i for i in ids if i in self.special_token_ids or i in eos_token_ids]
            if after:
                return after[0]
        own = self._tokenizer.eos_token_id
        if own is not None:
            return int(own)
        if eos_token_ids:
            return min(eos_token_ids)
        raise BaseRefused(
            "the base names no end-of-sequence token: neither its chat template, tokenizer_config.json,"
            " config.json nor generation_config.json has one, so no answer could end"
        )

    def _check_table(self, table: TokenTable) -> None:
        """Decode sample runs both ways; BaseRefused if joined bytes and the tokenizer's text differ."""
        whole = [i for i, data in enumerate(table.token_bytes) if data and _is_utf8(data)]
        random.Random(0).shuffle(whole)
        # Each run opens with a letter: decoders have rules of their own for the start of a text.
        letter = self.encode_answer("a")[-1]
        sample = whole[:65536]
        runs = [[letter, *sample[start : start + 64]] for start in range(0, len(sample), 64)]
        runs.append(self.encode_answer(_PROBE_TEXT))
        for run in runs:
            joined = b"".join(table.token_bytes[i] for i in run).decode("utf-8", "replace")
            if table.strips_leading_space:
                joined = joined.removeprefix(" ")
            decoded = self._backend.decode(run, False)
            if joined != decoded:
                raise BaseRefused(
                    "the base's tokenizer cannot be reproduced token by token:"
                    f" it decodes ids {run[:8]}... as {decoded[:60]!r} where their bytes read {joined[:60]!r}"
                )


class _Quotation:
    """Special tokens that messages spell out, hidden from the template's text behind marks nobody can guess."""

    def __init__(self, special_texts: re.Pattern[str] | None) -> None:
        self._special_texts = special_texts
        self._hidden: list[str] = []
        # Letters and digits alone, which a template that writes JSON or HTML leaves as they are.
        self._nonce = "q" + secrets.token_hex(8)

    @property
    def mark(self) -> str:
        """A word that stands in no message and hides nothing."""
        return f"{self._nonce}_mark"

    def hide(self, value: Any) -> Any:
        """A copy of a message, tool or argument, or of a part of one, with each special text replaced by a mark."""
        if isinstance(value, str) and self._special_texts is not None:
            return self._special_texts.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {key: self.hide(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(part) for part in value]
        return value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces; True for those that were hidden and are to be taken literally."""
        pieces = re.split(rf"{self._nonce}_(\d+)_", text)
        found = [(self._hidden[int(p)], True) if i % 2 else (p, False) for i, p in enumerate(pieces)]
        return [(piece, is_literal) for piece, is_literal in found if piece]

    def _mark(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._nonce}_{len(self._hidden) - 1}_"


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON text, and with words, if only empty ones."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or "", "tool_calls": calls}


def read_eos_token_ids(file: Path) -> set[int] | None:
    """`eos_token_id` of a config.json or generation_config.json, one or several; None if absent."""
    if not file.is_file():
        return None
    value = json.loads(file.read_bytes()).get("eos_token_id")
    if value is None:
        return None
    return {int(i) for i in (value if isinstance(value, list) else [value])}


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _guarded(call: Callable[[], _T], param: str) -> _T:
    """Turn the tokenizer library's errors into ours. A Rust panic arrives as a bare BaseException."""
    try:
        return call()
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidRequest(f"the tokenizer refused the input: {error}", param=param) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest(f"the tokenizer failed on the input: {error}", param=param) from error
