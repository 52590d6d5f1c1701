"""How an answer ends, what it says, and what is said once."""

from dataclasses import dataclass, replace

import pytest

from adapterd.core import (
    BASE_MIX,
    Batch,
    Output,
    Request,
    RequestId,
    SampledToken,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    TokenLogprobs,
)
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.outputs import OutputBuilder
from adapterd.token_table import TokenTable

WORDS = ("a", "b", "ST", "OP", "</s>")
A, B, ST, OP, EOS = range(5)
PARAMS = SamplingParams(max_tokens=6)
MAX_MODEL_LEN = 20


def logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, ())


@dataclass
class Answering:
    """One sequence whose prompt is computed; `say` hands it tokens until it ends."""

    params: SamplingParams = PARAMS
    num_prompt_tokens: int = 3

    def __post_init__(self) -> None:
        table = TokenTable(tuple(word.encode() for word in WORDS), strips_leading_space=False)
        self.builder = OutputBuilder(Vocabulary(table, frozenset({EOS})), MAX_MODEL_LEN)
        prompt = tuple(range(100, 100 + self.num_prompt_tokens))
        request = Request(RequestId("r"), prompt, self.params, BASE_MIX, frozenset({EOS}), 0.0)
        self.sequence = Sequence(request, 0, 0, list(prompt))
        self.builder.begin(self.sequence)

    def step(self, start: int, end: int, result: SampledToken) -> list[Output]:
        batch = Batch((ScheduledSequence(self.sequence, start, end - start),))
        return [output for _, output in self.builder.build(batch, [result])]

    def say(self, *tokens: int) -> list[Output]:
        outputs: list[Output] = []
        for token in tokens:
            assert not outputs or outputs[-1].finish_reason is None
            end = self.sequence.num_tokens
            outputs += self.step(end - 1, end, SampledToken(token, logprob(token)))
        return outputs


def ending(outputs: list[Output]) -> tuple[str, str | None, int | str | None, int]:
    last = outputs[-1]
    text = "".join(output.text for output in outputs)
    assert all(output.finish_reason is None for output in outputs[:-1])
    return text, last.finish_reason, last.stop_reason, last.num_output_tokens


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({}, (A, B, EOS), ("ab", "stop", None, 3)),
        ({"skip_special_tokens": False}, (A, EOS), ("a</s>", "stop", None, 2)),
        ({"ignore_eos": True, "max_tokens": 3}, (A, EOS, B), ("ab", "length", None, 3)),
        ({"max_tokens": 2}, (A, B), ("ab", "length", None, 2)),
        ({"stop_token_ids": (B,)}, (A, B), ("a", "stop", B, 2)),
        ({"stop_token_ids": (B,), "include_stop_str_in_output": True}, (A, B), ("ab", "stop", B, 2)),
        ({"stop_token_ids": (EOS,)}, (A, EOS), ("a", "stop", EOS, 2)),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, (A, EOS), ("a", "stop", EOS, 2)),
        ({"stop": ("STOP",)}, (A, ST, OP), ("a", "stop", "STOP", 3)),
        (
            {"stop": ("STOP",), "include_stop_str_in_output": True},
            (A, ST, OP),
            ("aSTOP", "stop", "STOP", 3),
        ),
        ({"stop": ("STOP",), "max_tokens": 2}, (A, ST), ("aST", "length", None, 2)),  # held back, then shown
        ({"stop": ("STOP",)}, (A, ST, EOS), ("aST", "stop", None, 3)),
        (
            {"stop": ("b",), "max_tokens": 2},
            (A, B),
            ("a", "stop", "b", 2),
        ),  # both at once: the stop is the reason
        ({"stop": ("a",), "min_tokens": 2}, (A, B, A), ("ab", "stop", "a", 3)),
        ({"stop": ("STOP",), "min_tokens": 3}, (ST, OP, A, ST, OP), ("STOPa", "stop", "STOP", 5)),
    ],
)
def test_answer_ends_where_it_was_asked_to(
    params: dict[str, object], tokens: tuple[int, ...], expected: tuple[object, ...]
) -> None:
    outputs = Answering(replace(PARAMS, **params)).say(*tokens)  # type: ignore[arg-type]
    assert ending(outputs) == expected
    assert tuple(token for output in outputs for token in output.token_ids) == tokens
    assert [entry.token_id for output in outputs for entry in output.logprobs] == list(tokens)


def test_answer_ends_where_the_context_does() -> None:
    answering = Answering(replace(PARAMS, max_tokens=100), num_prompt_tokens=MAX_MODEL_LEN - 2)
    assert ending(answering.say(A, B)) == ("ab", "length", None, 2)


def test_sequence_still_in_its_prompt_has_no_output() -> None:
    answering = Answering()
    assert answering.step(0, 2, SampledToken(None)) == []
    assert answering.sequence.num_output_tokens == 0


def test_scored_prompt_without_an_answer_ends_at_once_with_its_logprobs() -> None:
    answering = Answering(replace(PARAMS, max_tokens=0, prompt_logprobs=0))
    scored = tuple(map(logprob, (101, 102)))
    (output,) = answering.step(0, 3, SampledToken(A, prompt_logprobs=scored))
    assert (output.finish_reason, output.token_ids, output.text) == ("length", (), "")
    assert output.prompt_logprobs == scored
    assert output.num_output_tokens == 0
    assert answering.sequence.num_output_tokens == 0


def test_prompt_logprobs_are_said_once_in_order_whatever_was_computed_again() -> None:
    """In chunks, preempted in mid-prompt, computed anew in other chunks, preempted again while answering."""
    answering = Answering(replace(PARAMS, prompt_logprobs=0), num_prompt_tokens=6)

    def score(start: int, end: int, token: int | None = None) -> list[Output]:
        predicted = range(100 + start + 1, 100 + min(end, 5) + 1)
        return answering.step(start, end, SampledToken(token, prompt_logprobs=tuple(map(logprob, predicted))))

    assert score(0, 2) == []
    assert score(2, 4) == []
    assert score(0, 3) == []
    (first,) = score(3, 6, A)
    assert [entry.token_id for entry in first.prompt_logprobs] == [101, 102, 103, 104, 105]
    assert score(0, 5) == []
    (second,) = score(5, 7, B)
    assert second.prompt_logprobs == ()


def test_failed_row_ends_its_sequence_with_an_error_and_no_token() -> None:
    answering = Answering()
    answering.say(A)
    (output,) = answering.step(3, 4, SampledToken(None, error="broken"))
    assert (output.finish_reason, output.error, output.token_ids) == ("error", "broken", ())
    assert output.num_output_tokens == 1


def test_outputs_count_what_they_say() -> None:
    outputs = Answering().say(A, B, A)
    assert [output.num_output_tokens for output in outputs] == [1, 2, 3]
    assert {output.num_prompt_tokens for output in outputs} == {3}
