"""What the two dialects share: the head of an answer, its numbering, its usage, and how it may end."""

from collections.abc import Iterable
from dataclasses import dataclass

from adapterd.core import Output, RequestId
from adapterd.errors import AdapterdError, Overloaded, Unavailable
from adapterd.server.responses import Finish, Usage


@dataclass(frozen=True)
class Prompt:
    """`text` is what `echo` shows; empty where nobody asked for it."""

    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class AnswerHead:
    """What every chunk of one answer repeats. There is one engine request for each prompt, in order."""

    id: str
    created: int
    model: str
    prompts: tuple[Prompt, ...]
    request_ids: tuple[RequestId, ...]
    n: int
    include_usage: bool

    def prompt(self, output: Output) -> Prompt:
        return self.prompts[self.request_ids.index(output.request_id)]

    def choice_index(self, output: Output) -> int:
        return self.request_ids.index(output.request_id) * self.n + output.index


class GenerationFailed(AdapterdError):
    """The engine gave up on a sequence."""

    code = "generation_failed"


def finish_reason(output: Output) -> Finish:
    """Raises what the client should see where the sequence did not end by itself."""
    if output.finish_reason == "stop" or output.finish_reason == "length":
        return output.finish_reason
    if output.finish_reason == "overloaded":
        raise Overloaded(output.error or "there is no memory for the request")
    if output.finish_reason == "abort":
        raise Unavailable(output.error or "the request was aborted")
    raise GenerationFailed(output.error or "the engine failed on this request")


def check_alive(outputs: Iterable[Output]) -> None:
    """Raises for the first sequence that was aborted or failed."""
    for output in outputs:
        if output.finish_reason is not None:
            finish_reason(output)


class UsageTally:
    """Counts tokens over all sequences of an answer. A prompt counts once, however many answers it gets."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._output_tokens: dict[tuple[RequestId, int], int] = {}
        self._cached_tokens: dict[RequestId, int] = {}

    def add(self, output: Output) -> None:
        self._output_tokens[output.request_id, output.index] = output.num_output_tokens
        # The first count: a preempted sequence finds its own tokens in the cache when it comes back.
        self._cached_tokens.setdefault(output.request_id, output.num_cached_tokens)

    def usage(self) -> Usage:
        num_output_tokens = sum(self._output_tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }
