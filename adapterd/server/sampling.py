"""From a checked body to `SamplingParams`: the model's own defaults filled in, the context kept."""

from collections.abc import Mapping
from typing import TypeVar

from adapterd.core import BaseSpec, SamplingParams
from adapterd.errors import ContextLengthExceeded, InvalidRequest
from adapterd.server.protocol import ChatCompletionRequest, CompletionRequest

N = TypeVar("N", int, float)

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of /v1/completions; a chat answer may take the rest of the context."""


def sampling_params(
    body: ChatCompletionRequest | CompletionRequest,
    defaults: Mapping[str, float | int],
    spec: BaseSpec,
    num_prompt_tokens: int,
) -> SamplingParams:
    """Raises InvalidRequest for limits that contradict each other, ContextLengthExceeded for what cannot fit."""
    max_tokens = _max_tokens(body, spec, num_prompt_tokens)
    if body.min_tokens > max_tokens:
        message = (
            f"min_tokens is {body.min_tokens}, which is more than the {max_tokens} tokens the answer may have"
        )
        raise InvalidRequest(message, param="min_tokens")
    logprobs, prompt_logprobs = _logprobs(body)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=float(_first(body.temperature, defaults.get("temperature"), 1.0)),
        top_k=max(0, int(_first(body.top_k, defaults.get("top_k"), 0))),
        top_p=float(_first(body.top_p, defaults.get("top_p"), 1.0)),
        min_p=float(_first(body.min_p, defaults.get("min_p"), 0.0)),
        repetition_penalty=float(_first(body.repetition_penalty, defaults.get("repetition_penalty"), 1.0)),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        logit_bias=body.logit_bias,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_prompt(token_ids: tuple[int, ...], spec: BaseSpec, param: str) -> None:
    """Raises InvalidRequest for a prompt of nothing, ContextLengthExceeded. Token ids are checked by the engine."""
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens", param=param)
    if len(token_ids) >= spec.max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {spec.max_model_len} tokens, and the prompt alone has"
            f" {len(token_ids)}. Please shorten it.",
            param=param,
        )


def _max_tokens(
    body: ChatCompletionRequest | CompletionRequest, spec: BaseSpec, num_prompt_tokens: int
) -> int:
    room = spec.max_model_len - num_prompt_tokens
    if isinstance(body, CompletionRequest):
        asked = _first(body.max_tokens, min(DEFAULT_COMPLETION_TOKENS, room))
    else:
        asked = _first(body.max_completion_tokens, body.max_tokens, room)
        if body.max_tokens is not None and body.max_tokens != asked:
            raise InvalidRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
    if asked > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {spec.max_model_len} tokens. However, you requested"
            f" {num_prompt_tokens + asked} tokens ({num_prompt_tokens} in the prompt, {asked} in the answer)."
            " Please shorten either.",
            param="max_tokens",
        )
    return asked


def _logprobs(body: ChatCompletionRequest | CompletionRequest) -> tuple[int | None, int | None]:
    """How many alternatives to report beside each token of the answer and of the prompt."""
    if isinstance(body, ChatCompletionRequest):
        return (body.top_logprobs or 0) if body.logprobs else None, None
    return body.logprobs, body.logprobs if body.echo else None


def _first(*values: N | None) -> N:
    """The first value that is set; the last one always is."""
    return next(value for value in values if value is not None)
