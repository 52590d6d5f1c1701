"""From sampled tokens to outputs: appends the token, says whether and why the sequence ends, and its text. No torch."""

from dataclasses import dataclass, field

from adapterd.core import Batch, FinishReason, Output, SampledToken, Sequence, SequenceState, TokenLogprobs
from adapterd.engine.detokenizer import Detokenizer, Vocabulary


@dataclass
class _Answer:
    """What is known of a sequence's answer beyond its tokens."""

    detokenizer: Detokenizer
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class _Ending:
    reason: FinishReason
    stop_reason: int | str | None = None
    shows_token: bool = True


class OutputBuilder:
    """One per engine; keeps the detokenizer of every sequence until it ends."""

    def __init__(self, vocabulary: Vocabulary, max_model_len: int) -> None:
        self._vocabulary = vocabulary
        self._max_model_len = max_model_len
        self._answers: dict[int, _Answer] = {}  # by id(sequence)

    def begin(self, sequence: Sequence) -> None:
        params = sequence.request.params
        self._answers[id(sequence)] = _Answer(
            Detokenizer(
                self._vocabulary,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                continues_prompt=sequence.request.continues_prompt,
            )
        )

    def forget(self, sequence: Sequence) -> None:
        """The sequence is aborted or finished."""
        self._answers.pop(id(sequence), None)

    def build(self, batch: Batch, sampled: list[SampledToken]) -> list[tuple[Sequence, Output]]:
        """Outputs of the sequences that got a token or an error; those still in their prompt have none.

        Nor have those that ended, by a stop or an abort, while the batch was in flight.
        """
        built = []
        for item, result in zip(batch.scheduled, sampled, strict=True):
            if item.sequence.state is SequenceState.FINISHED:
                continue
            answer = self._answers[id(item.sequence)]
            # After a preemption prompt tokens run again; what was already said of them is not said twice.
            new = item.start + len(result.prompt_logprobs) - len(answer.prompt_logprobs)
            if new > 0:
                answer.prompt_logprobs.extend(result.prompt_logprobs[-new:])
            if result.error is not None:
                built.append((item.sequence, self._failed(item.sequence, result.error)))
            elif result.token_id is not None:
                built.append((item.sequence, self._advance(item.sequence, answer, result)))
        return built

    def _failed(self, sequence: Sequence, error: str) -> Output:
        return self._output(sequence, (), "", (), _Ending("error"), (), error)

    def _advance(self, sequence: Sequence, answer: _Answer, result: SampledToken) -> Output:
        params = sequence.request.params
        prompt_logprobs = tuple(answer.prompt_logprobs) if sequence.num_output_tokens == 0 else ()
        if params.max_tokens == 0:  # the prompt was only to be scored
            return self._output(sequence, (), "", (), _Ending("length"), prompt_logprobs)
        token_id = result.token_id
        assert token_id is not None
        sequence.token_ids.append(token_id)
        check_stop = sequence.num_output_tokens >= params.min_tokens
        ending = self._ending(sequence, token_id)
        text = ""
        if ending is None or ending.shows_token:
            delta = answer.detokenizer.push(token_id, check_stop=check_stop)
            text = delta.text
            if delta.stop is not None:
                ending = _Ending("stop", delta.stop)
        if ending is not None and not isinstance(ending.stop_reason, str):
            delta = answer.detokenizer.flush(check_stop=check_stop)
            text += delta.text
            if delta.stop is not None:
                ending = _Ending("stop", delta.stop)
        logprobs = (result.logprobs,) if result.logprobs is not None else ()
        return self._output(sequence, (token_id,), text, logprobs, ending, prompt_logprobs)

    def _ending(self, sequence: Sequence, token_id: int) -> _Ending | None:
        request = sequence.request
        if token_id in request.params.stop_token_ids:
            return _Ending("stop", token_id, shows_token=request.params.include_stop_str_in_output)
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return _Ending("stop", shows_token=not request.params.skip_special_tokens)
        if (
            sequence.num_output_tokens >= request.params.max_tokens
            or len(sequence.token_ids) >= self._max_model_len
        ):
            return _Ending("length")
        return None

    def _output(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprobs, ...],
        ending: _Ending | None,
        prompt_logprobs: tuple[TokenLogprobs, ...],
        error: str | None = None,
    ) -> Output:
        return Output(
            request_id=sequence.request.id,
            index=sequence.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_output_tokens=sequence.num_output_tokens,
            finish_reason=ending.reason if ending else None,
            stop_reason=ending.stop_reason if ending else None,
            prompt_logprobs=prompt_logprobs,
            error=error,
        )


def ended(sequence: Sequence, reason: FinishReason, error: str) -> Output:
    """The last output of a sequence that ends without an answer of its own."""
    return Output(
        request_id=sequence.request.id,
        index=sequence.index,
        token_ids=(),
        text="",
        logprobs=(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=0,
        num_output_tokens=sequence.num_output_tokens,
        finish_reason=reason,
        error=error,
    )
