"""What a step that is being put together has left to give. No torch."""

from dataclasses import dataclass

from adapterd.core import ScheduledSequence, Sequence


@dataclass
class StepRoom:
    """Tokens, and how many of them may be scored: to tell a prompt's own log probabilities takes a row of logits for
    each of its tokens, and the rows of a whole chunk can be gigabytes.
    """

    num_tokens: int
    num_scored: int

    def fit(self, sequence: Sequence) -> int:
        """How many of a sequence's next tokens fit."""
        start = sequence.num_computed_tokens
        count = min(sequence.num_tokens - start, self.num_tokens)
        return count if _num_scored(sequence, start, count) <= self.num_scored else self.num_scored

    def take(self, item: ScheduledSequence) -> None:
        self.num_tokens -= item.num_tokens
        self.num_scored -= _num_scored(item.sequence, item.start, item.num_tokens)

    def give_back(self, item: ScheduledSequence) -> None:
        self.num_tokens += item.num_tokens
        self.num_scored += _num_scored(item.sequence, item.start, item.num_tokens)


def _num_scored(sequence: Sequence, start: int, num_tokens: int) -> int:
    """Of the tokens from `start` on, those that predict one of the prompt whose log probability is asked for."""
    if sequence.request.params.prompt_logprobs is None:
        return 0
    return max(min(num_tokens, sequence.num_prompt_tokens - 1 - start), 0)
