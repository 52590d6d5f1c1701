"""Asks the engine that serves: answers, seeds, latencies, and losses by prompt log probabilities. All batched."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

from adapterd.composition import ResolvedModel
from adapterd.core import Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from adapterd.engine.offline import Finished
from adapterd.errors import InvalidRequest
from adapterd.evaluation.arms import Prompting
from adapterd.evaluation.scoring import Answer
from adapterd.evaluation.task import answer_ids
from adapterd.training.data import Row
from adapterd.training.forms import squeeze

NUM_TIMED_ROWS = 8
"""Rows asked one by one, for the time a single request takes."""


@dataclass(frozen=True)
class Cost:
    """What the answers to all rows took. `latency_seconds`: the median of single requests, one at a time.

    `seconds` is the whole batch; None for another server, whose rows are asked side by side.
    `money`: for all rows, in the currency of the price; None without one.
    """

    num_prompt_tokens: int
    num_answer_tokens: int
    seconds: float | None
    latency_seconds: float
    money: float | None


@dataclass(frozen=True)
class Loss:
    """Cross entropy in nats, summed over `num_tokens` tokens of one text."""

    nats: float
    num_tokens: int


class Asker:
    """One daemon's engine, asked in the calling thread. The adapters asked must be leased meanwhile."""

    def __init__(self, daemon: Daemon, *, max_tokens: int, max_at_once: int) -> None:
        """`max_at_once`: how many requests the engine's queue takes."""
        self._daemon = daemon
        self._max_tokens = max_tokens
        self._max_at_once = max(1, max_at_once)
        self._num_asked = 0

    @property
    def max_model_len(self) -> int:
        return self._daemon.engine.max_model_len

    def render(self, rows: Sequence[Row], prompting: Prompting, model: ResolvedModel) -> list[list[int]]:
        """The prompts that the server would make of the rows."""
        return [
            self._daemon.renderer.render(
                prompting.messages(row), chat_template=model.chat_template, tools=row.tools or None
            )
            for row in rows
        ]

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt leaves room for an answer of `max_tokens`."""
        return len(prompt) + self._max_tokens <= self.max_model_len

    def fits_answer(self, prompt: Sequence[int], row: Row) -> bool:
        """Whether the row's reference and its end fit the context after a prompt: else nobody could give it."""
        return len(prompt) + len(answer_ids(row, self._daemon.renderer)) <= self.max_model_len

    def answers(
        self,
        rows: Sequence[Row],
        references: Sequence[str],
        prompts: Sequence[list[int]],
        model: ResolvedModel,
        *,
        price_per_hour: float | None,
    ) -> tuple[list[Answer], Cost]:
        """The greedy answer to each prompt, beside the row it came from. The first are asked alone before, for the
        time: later they would lie in the prefix cache."""
        params = SamplingParams(max_tokens=self._max_tokens, temperature=0.0)
        self._run([(self._daemon.renderer.encode("a"), params)], model)  # loads the adapter, warms the caches
        times = list(self._times_alone(prompts[:NUM_TIMED_ROWS], params, model))
        began = time.monotonic()
        finished = self._run([(prompt, params) for prompt in prompts], model)
        seconds = time.monotonic() - began
        answers = [
            Answer(
                prompt=row.prompt_text,
                reference=reference,
                text=one.text,
                num_tokens=len(one.token_ids),
                stopped=one.finish_reason == "stop",
                tags=row.tags,
            )
            for row, reference, one in zip(rows, references, finished, strict=True)
        ]
        cost = Cost(
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            num_answer_tokens=sum(answer.num_tokens for answer in answers),
            seconds=seconds,
            latency_seconds=statistics.median(times),
            money=None if price_per_hour is None else seconds / 3600 * price_per_hour,
        )
        return answers, cost

    def agreement(
        self, prompts: Sequence[list[int]], model: ResolvedModel, *, samples: int, temperature: float
    ) -> list[float]:
        """Of each prompt's `samples` answers drawn with seeds 1, 2, ...: the share of pairs that say the same."""
        asked = [
            (
                prompt,
                SamplingParams(max_tokens=self._max_tokens, temperature=temperature, seed=seed),
            )
            for prompt in prompts
            for seed in range(1, samples + 1)
        ]
        texts = iter([squeeze(one.text) for one in self._run(asked, model)])
        shares = []
        for _ in prompts:
            pairs = list(combinations(islice(texts, samples), 2))
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
        return shares

    def answer_losses(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], model: ResolvedModel
    ) -> list[Loss | None]:
        """Of each reference with its stop token, after its prompt; None for one that does not fit the context."""
        whole: list[tuple[list[int], int] | None] = []
        for row, prompt in zip(rows, prompts, strict=True):
            answer = answer_ids(row, self._daemon.renderer)
            tokens = [*prompt, *answer]
            whole.append((tokens, len(answer)) if len(tokens) <= self.max_model_len else None)
        found = iter(self._losses([item for item in whole if item is not None], model))
        return [None if item is None else next(found) for item in whole]

    def text_losses(self, texts: Sequence[str], model: ResolvedModel) -> list[Loss]:
        """Of each text's tokens after the first; a text longer than the context in pieces of its length."""
        pieces: list[tuple[int, list[int]]] = []
        for number, text in enumerate(texts):
            tokens = self._daemon.renderer.encode(text)
            for start in range(0, len(tokens), self.max_model_len):
                piece = tokens[start : start + self.max_model_len]
                if len(piece) > 1:
                    pieces.append((number, piece))
        losses = self._losses([(piece, len(piece) - 1) for _, piece in pieces], model)
        sums = [Loss(0.0, 0)] * len(texts)
        for (number, _), loss in zip(pieces, losses, strict=True):
            sums[number] = Loss(sums[number].nats + loss.nats, sums[number].num_tokens + loss.num_tokens)
        return sums

    def _losses(self, texts: Sequence[tuple[list[int], int]], model: ResolvedModel) -> list[Loss]:
        """Of the last tokens of each text, as many as stand beside it."""
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        finished = self._run([(tokens, params) for tokens, _ in texts], model)
        return [
            Loss(-sum(entry.logprob for entry in one.prompt_logprobs[-count:]), count)
            for one, (_, count) in zip(finished, texts, strict=True)
        ]

    def _times_alone(
        self, prompts: Sequence[list[int]], params: SamplingParams, model: ResolvedModel
    ) -> Iterator[float]:
        for prompt in prompts:
            began = time.monotonic()
            self._run([(prompt, params)], model)
            yield time.monotonic() - began

    def _run(self, asked: Sequence[tuple[list[int], SamplingParams]], model: ResolvedModel) -> list[Finished]:
        """All at once, as many as the engine's queue takes; the answers in the order of the questions."""
        finished: list[Finished] = []
        for start in range(0, len(asked), self._max_at_once):
            some = asked[start : start + self._max_at_once]
            requests = []
            for prompt, params in some:
                self._num_asked += 1
                room = self.max_model_len - len(prompt)
                requests.append(
                    Request(
                        id=RequestId(f"eval-{self._num_asked}"),
                        prompt_token_ids=tuple(prompt),
                        params=replace(params, max_tokens=min(params.max_tokens, room)),
                        mix=model.mix,
                        eos_token_ids=model.eos_token_ids,
                        arrival_seconds=time.monotonic(),
                    )
                )
            answers = self._daemon.generate(requests)
            for request in requests:
                one = answers[request.id, 0]
                if one.finish_reason == "error":
                    raise InvalidRequest(
                        "the model gave no number on a held-out row: its logits are not finite"
                    )
                finished.append(one)
        return finished
