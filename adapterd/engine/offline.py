"""Running an engine by hand, a step at a time, until every answer is whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterd.core import FinishReason, Output, RequestId, TokenLogprobs
from adapterd.engine.engine import Engine


@dataclass(frozen=True)
class Finished:
    """One whole answer of an offline run."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]


def collect(engine: Engine) -> dict[tuple[RequestId, int], Finished]:
    """Step an engine until it is idle, and put the outputs together."""
    parts: dict[tuple[RequestId, int], list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            parts.setdefault((output.request_id, output.index), []).append(output)
    return {key: _join(outputs) for key, outputs in parts.items()}


def _join(outputs: Sequence[Output]) -> Finished:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Finished(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        finish_reason=reason,
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
