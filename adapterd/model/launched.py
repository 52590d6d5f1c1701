"""A step between its launch and its reading: what the host will read of it, and what the device alone knows so far."""

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from adapterd.core import SampledToken, Sequence
from adapterd.model.sampler import RowLogprobs, Sampling
from adapterd.model.transfer import Readback


class LastTokens:
    """The tokens sampled by the step that was launched last: on the device, where the next step finds them.

    tokens: int64 [max_num_seqs], of which the first rows are written by each step; it never moves.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self._rows: dict[Hashable, int] = {}

    def keep(self, sequences: Seq[Sequence], token_ids: torch.Tensor) -> None:
        """token_ids: int64 [len(sequences)] on the device."""
        self._rows = {(s.request.id, s.index): row for row, s in enumerate(sequences)}
        self.tokens[: len(sequences)].copy_(token_ids)

    def row(self, sequence: Sequence) -> int:
        """Where a sequence's pending token lies."""
        return self._rows[sequence.request.id, sequence.index]


@dataclass(frozen=True)
class RowResults:
    """What one scheduled sequence asked for."""

    samples: bool
    prompt_logprobs: RowLogprobs | None


@dataclass(frozen=True)
class Launched:
    """`sampling` has a row for each of `rows` that samples, in order; None if there is none."""

    rows: Seq[RowResults]
    sampling: Sampling | None
    readback: Readback

    def collect(self) -> list[SampledToken]:
        """Wait for the device; one result for each scheduled sequence, in order."""
        self.readback.wait()
        tokens = iter(self.sampling.results() if self.sampling is not None else ())
        results = []
        for row in self.rows:
            token = next(tokens) if row.samples else SampledToken(None)
            if row.prompt_logprobs is not None:
                found = row.prompt_logprobs.entries()
                token = SampledToken(token.token_id, token.logprobs, found, token.error)
            results.append(token)
        return results
