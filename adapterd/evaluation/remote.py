"""Models behind another OpenAI-compatible endpoint: the peer that an adapter may replace, and the judge.

The official client does the talking, with its own retries. Keys come from a variable that is named, never
from a flag, and are never logged.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterd.errors import ConfigError, Unavailable
from adapterd.evaluation.arms import Messages
from adapterd.evaluation.ask import NUM_TIMED_ROWS, Cost
from adapterd.evaluation.scoring import Answer
from adapterd.training.data import Row

_TIMEOUT_SECONDS = 120.0
_REQUESTS_AT_ONCE = 8
_TOKENS_PER_PRICE = 1_000_000

_In = TypeVar("_In")
_Out = TypeVar("_Out")

JUDGE_PROMPT = """You grade one answer of an assistant against an expert's answer.

Question:
{prompt}

Expert's answer:
{reference}

Answer to grade:
{answer}

Does it say the same as the expert's answer, in the same form, with nothing wrong added? Think briefly, then end with \
one line: GRADE: C if it does, GRADE: I if it does not."""
_GRADE = re.compile(r"GRADE:\s*\**\s*([CI])\b")


@dataclass(frozen=True)
class Reply:
    text: str
    stopped: bool
    num_prompt_tokens: int
    num_answer_tokens: int
    seconds: float


class Endpoint:
    """One model at one base URL (ending in /v1, as the official client wants it)."""

    def __init__(self, url: str, model: str, key_variable: str | None) -> None:
        """Raises ConfigError without the client's package, or if the variable of the key is not set."""
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "asking another server needs the package openai: pip install 'adapterd[eval]'"
            ) from None
        if key_variable is not None and not os.environ.get(key_variable):
            raise ConfigError(f"the variable {key_variable} holds no key for {url}")
        key = os.environ[key_variable] if key_variable else "none"
        self.url, self.model = url, model
        self._failure: type[Exception] = openai.OpenAIError
        self._client: Any = openai.OpenAI(base_url=url, api_key=key, timeout=_TIMEOUT_SECONDS, max_retries=3)

    def ask(self, messages: Messages, *, max_tokens: int) -> Reply:
        """One greedy answer. Raises Unavailable, naming the server and its error, after the client's retries."""
        began = time.monotonic()
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[dict(message) for message in messages],
                max_tokens=max_tokens,
                temperature=0,
            )
        except self._failure as error:
            raise Unavailable(f"{self.model} at {self.url} did not answer: {error}") from error
        if not answer.choices:
            raise Unavailable(f"{self.model} at {self.url} answered without a choice")
        choice, usage = answer.choices[0], answer.usage
        return Reply(
            text=choice.message.content or "",
            stopped=choice.finish_reason == "stop",
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_answer_tokens=usage.completion_tokens if usage else 0,
            seconds=time.monotonic() - began,
        )


def ask_peer(
    endpoint: Endpoint,
    rows: Sequence[Row],
    references: Sequence[str],
    chats: Sequence[Messages],
    *,
    max_tokens: int,
    price_in: float | None,
    price_out: float | None,
) -> tuple[list[Answer], Cost]:
    """The peer's answer to each chat: the first rows one by one, for the time of a single request, the rest together.

    Prices are for a million tokens.
    """
    timed = [endpoint.ask(messages, max_tokens=max_tokens) for messages in chats[:NUM_TIMED_ROWS]]
    rest = _side_by_side(
        lambda messages: endpoint.ask(messages, max_tokens=max_tokens), chats[NUM_TIMED_ROWS:]
    )
    replies = [*timed, *rest]
    answers = [
        Answer(
            prompt=row.prompt_text,
            reference=reference,
            text=reply.text,
            num_tokens=reply.num_answer_tokens,
            stopped=reply.stopped,
            tags=row.tags,
        )
        for row, reference, reply in zip(rows, references, replies, strict=True)
    ]
    num_prompt_tokens = sum(reply.num_prompt_tokens for reply in replies)
    num_answer_tokens = sum(reply.num_answer_tokens for reply in replies)
    money = None
    if price_in is not None or price_out is not None:
        money = (
            num_prompt_tokens * (price_in or 0) + num_answer_tokens * (price_out or 0)
        ) / _TOKENS_PER_PRICE
    return answers, Cost(
        num_prompt_tokens=num_prompt_tokens,
        num_answer_tokens=num_answer_tokens,
        seconds=None,
        latency_seconds=statistics.median(reply.seconds for reply in timed),
        money=money,
    )


class Judge:
    """Another model says of each answer whether it is as good as the reference. Equal answers are asked about once."""

    def __init__(self, endpoint: Endpoint, *, max_tokens: int = 400) -> None:
        self.endpoint = endpoint
        self._max_tokens = max_tokens
        self._grades: dict[tuple[str, str, str], float | None] = {}

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """1 for right, 0 for wrong, None where the judge gave no grade."""
        asked = [(answer.prompt, answer.reference, answer.text) for answer in answers]
        new = [key for key in dict.fromkeys(asked) if key not in self._grades]
        self._grades |= dict(zip(new, _side_by_side(self._grade, new), strict=True))
        return [self._grades[key] for key in asked]

    def _grade(self, key: tuple[str, str, str]) -> float | None:
        said = dict(zip(("prompt", "reference", "answer"), key, strict=True))
        # In one pass and not by str.format: braces that an answer holds are no fields.
        text = re.sub(r"\{(prompt|reference|answer)\}", lambda field: said[field[1]], JUDGE_PROMPT)
        reply = self.endpoint.ask(({"role": "user", "content": text},), max_tokens=self._max_tokens)
        grades = _GRADE.findall(reply.text)
        return None if not grades else float(grades[-1] == "C")


def _side_by_side(do: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """In order; a first failure ends it."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        futures = [pool.submit(do, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
