"""From logits to tokens. What one row draws depends on its own logits, parameters, seed and place alone.

The randomness of a draw is one number, a hash of (seed, output index), turned into a token by the inverse of
the row's cumulative distribution: no generator has a state, so a batch's company cannot shift anyone's noise.

Everything is launched without waiting for the device; what the host wants to know of it comes by a `Readback`.
"""

import hashlib
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf, isfinite

import torch

from adapterd.core import SampledToken, SamplingParams, TokenLogprobs
from adapterd.model.transfer import Readback, to_device
from adapterd.token_counts import TokenCounts

_GREEDY_BELOW = 1e-5
"""Temperatures under this choose the likeliest token: dividing by them would overflow float32."""

_PIECE = 512

_SCORED_BYTES = 32 << 20
"""Of logits in float32 whose log probabilities are taken at a time: that takes some three times as much."""


@dataclass(frozen=True)
class SamplerRow:
    """One row to sample: the answer's token at `output_index`. `suppressed_token_ids` may not be chosen yet.

    `token_counts` are of prompt and output, read for penalties alone: where there are none, they may be missing.
    """

    params: SamplingParams
    seed: int
    token_counts: TokenCounts
    output_index: int
    suppressed_token_ids: frozenset[int]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1): a pure function of (seed, index)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """Sampled rows. `token_ids`: int64 [num_rows] on the device, a token of the vocabulary even where a row erred."""

    token_ids: torch.Tensor
    _host_ids: torch.Tensor
    _host_peaks: torch.Tensor
    _logprobs: "tuple[list[int], RowLogprobs] | None"

    def results(self) -> list[SampledToken]:
        """One a row; after the readback's `wait`.

        A row whose logits hold NaN or +inf, or leave nothing to choose, gets an error; its neighbours are untouched.
        """
        logprobs: dict[int, TokenLogprobs] = {}
        if self._logprobs is not None:
            rows, found = self._logprobs
            logprobs = dict(zip(rows, found.entries(), strict=True))
        return [
            SampledToken(token, logprobs.get(row))
            if isfinite(peak)
            else SampledToken(None, error="the logits are non-finite or leave no token")
            for row, (token, peak) in enumerate(
                zip(self._host_ids.tolist(), self._host_peaks.tolist(), strict=True)
            )
        ]


def start_sampling(logits: torch.Tensor, rows: Seq[SamplerRow], readback: Readback) -> Sampling:
    """logits: [num_rows, vocab_size], any float dtype -> one token a row."""
    adjusted = _adjust(logits, rows)
    # NaN counts as the greatest, so this one value tells of any that is none: no second reading of the vocabulary.
    peaks, likeliest = _greatest(adjusted)
    chosen = _draw_where_asked(adjusted, rows, likeliest)
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = None
    if wanted:
        picked = _pick(wanted, len(rows), logits.device)
        counts = [rows[index].params.logprobs or 0 for index in wanted]
        found = start_logprobs(logits[picked], chosen[picked], counts, readback)
        logprobs = wanted, found
    return Sampling(chosen, readback.begin(chosen), readback.begin(peaks), logprobs)


@dataclass(frozen=True)
class RowLogprobs:
    """On their way to the host: what the raw distribution says of one token a row.

    columns: token ids, their log probabilities and ranks, [num_rows]; likeliest ids and theirs, [num_rows, num_top].
    """

    columns: tuple[torch.Tensor, ...]
    num_top: Seq[int]

    def entries(self) -> tuple[TokenLogprobs, ...]:
        """After the readback's `wait`."""
        return tuple(
            TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
            for token_id, logprob, rank, ids, values, count in zip(
                *(column.tolist() for column in self.columns), self.num_top, strict=True
            )
        )


def start_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: Seq[int], readback: Readback
) -> RowLogprobs:
    """logits: [num_rows, vocab_size], token_ids: int64 [num_rows], num_top: alternatives to tell of, by row.

    A few rows at a time: a prompt has as many as a step has tokens.
    """
    vocab_size = logits.shape[-1]
    num_rows = max(_SCORED_BYTES // (4 * vocab_size), 1)
    num_columns = min(max(num_top), vocab_size)
    parts = [
        _score(logits[start : start + num_rows], token_ids[start : start + num_rows], num_columns)
        for start in range(0, len(logits), num_rows)
    ]
    found = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
    return RowLogprobs(tuple(readback.begin(tensor) for tensor in (token_ids, *found)), num_top)


def _score(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    """What `RowLogprobs.columns` has beside the token ids. Of each row by itself."""
    log_probs = logits.float().log_softmax(-1)
    own = log_probs.gather(-1, token_ids[:, None])
    ranks = (log_probs > own).sum(-1) + 1
    top_values, top_ids = log_probs.topk(num_top, dim=-1)
    return own[:, 0], ranks, top_ids, top_values


class _Changes:
    """Numbers for places of the flattened logits, row by row; no place twice."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, first: int, token_ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """first: the row's place; token_ids: int64 [n], numbers: float64 [n], both on the host. They are copied."""
        if len(token_ids):
            self._parts.append(torch.stack([(token_ids + first).double(), numbers]))

    def on_device(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 and float32 [num_places], in one copy: float64 holds any place there is."""
        places, numbers = to_device(torch.cat(self._parts, dim=1), device)
        return places.long(), numbers.float()


def _adjust(logits: torch.Tensor, rows: Seq[SamplerRow]) -> torch.Tensor:
    """Penalties, biases and suppressed tokens, on a copy in float32 if any row asks for them.

    What is done here in Python for a row does not grow with its tokens; what is done in vectors grows with those
    that differ, and is less than the pass over the vocabulary that follows.
    """
    factors, shifts = _Changes(), _Changes()
    for index, row in enumerate(rows):
        params, first = row.params, index * logits.shape[-1]
        if params.repetition_penalty != 1:
            held = _view(row.token_counts.token_ids)
            factors.add(first, held, torch.full_like(held, params.repetition_penalty, dtype=torch.float64))
        if (
            params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or row.suppressed_token_ids
        ):
            shifts.add(first, *_shifts(row))
    if not factors and not shifts:
        return logits
    adjusted = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
    flat = adjusted.view(-1)
    if factors:
        places, factor = factors.on_device(logits.device)
        scores = flat[places]
        flat[places] = torch.where(scores > 0, scores / factor, scores * factor)
    if shifts:
        places, shift = shifts.on_device(logits.device)
        flat[places] += shift
    return adjusted


def _shifts(row: SamplerRow) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to a row's logits: token ids, none twice, and float64 as many."""
    params, counts = row.params, row.token_counts
    held, shift = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    if params.presence_penalty or params.frequency_penalty:
        held, num_outputs = _view(counts.token_ids), _view(counts.num_outputs)
        shift = -(params.frequency_penalty * num_outputs.double()).add_(params.presence_penalty)
        shift[num_outputs == 0] = 0.0
    others: dict[int, float] = {}
    asked = [*params.logit_bias, *((token, -inf) for token in row.suppressed_token_ids)]
    for token, number in asked:
        place = counts.row(token) if len(held) else None
        if place is None:
            others[token] = others.get(token, 0.0) + number
        else:
            shift[place] += number
    if not others:
        return held, shift
    return (
        torch.cat([held, torch.tensor(list(others))]),
        torch.cat([shift, torch.tensor(list(others.values()), dtype=torch.float64)]),
    )


def _view(numbers: "array[int]") -> torch.Tensor:
    """int64 [len(numbers)], the array's own memory: to be copied before the array grows."""
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _greatest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and place of each row's first greatest logit, as `logits.max(-1)`: [num_rows] and int64 [num_rows]."""
    if logits.device.type != "cpu":
        return logits.max(-1)
    # torch's max with places goes one by one, its max without in vectors: so first which piece, then where in it.
    # Measured at 16 rows of 151,936 in bfloat16, one core: 1.0 ms for 2.4, and for 31 by argmax.
    vocab_size = logits.shape[-1]
    num_whole = vocab_size // _PIECE
    whole, rest = logits[:, : num_whole * _PIECE], logits[:, num_whole * _PIECE :]
    peaks = [whole.view(len(logits), num_whole, _PIECE).amax(-1)]
    if rest.shape[-1]:
        peaks.append(rest.amax(-1, keepdim=True))
    start = torch.cat(peaks, dim=-1).argmax(-1, keepdim=True) * _PIECE
    places = (start + torch.arange(_PIECE)).clamp_(max=vocab_size - 1)
    values, within = logits.gather(-1, places).max(-1, keepdim=True)
    return values[:, 0], (start + within)[:, 0]


def _draw_where_asked(logits: torch.Tensor, rows: Seq[SamplerRow], likeliest: torch.Tensor) -> torch.Tensor:
    """int64 [num_rows]: the likeliest token, or one drawn where a row has a temperature."""
    chosen = likeliest
    drawing = [index for index, row in enumerate(rows) if row.params.temperature >= _GREEDY_BELOW]
    # Sorted or not, the same noise finds another token: each row goes the way its own parameters ask for.
    for is_sorted in (False, True):
        members = [index for index in drawing if _needs_order(rows[index].params) == is_sorted]
        if members:
            picked = _pick(members, len(rows), logits.device)
            drawn = _draw(logits[picked], [rows[index] for index in members], is_sorted)
            chosen[picked] = drawn
    return chosen


def _pick(members: list[int], num_rows: int, device: torch.device) -> "slice | torch.Tensor":
    """An index for these rows, in order; to take all of them copies nothing."""
    return slice(None) if len(members) == num_rows else to_device(torch.tensor(members), device)


def _needs_order(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _draw(logits: torch.Tensor, rows: Seq[SamplerRow], is_sorted: bool) -> torch.Tensor:
    """Top-k, then top-p (both only if `is_sorted`), then min-p on the tempered distribution, then one draw a row."""
    vocab_size = logits.shape[-1]
    asked = [
        (p.temperature, p.top_k or vocab_size, p.top_p, p.min_p, uniform(row.seed, row.output_index))
        for row, p in ((row, row.params) for row in rows)
    ]
    numbers = to_device(torch.tensor(asked, dtype=torch.float64).T.contiguous(), logits.device)[:, :, None]
    temperature, top_p, min_p = (numbers[i].float() for i in (0, 2, 3))
    top_k, noise = numbers[1], numbers[4]
    probs = (logits.float() / temperature).softmax(-1)
    order = None
    if is_sorted:
        # Stable, so that equal probabilities keep the vocabulary's order whatever else is in the batch.
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(torch.arange(vocab_size, device=logits.device) >= top_k, 0.0)
        before = probs.cumsum(-1) - probs
        # A token stays while the mass before it is short of top_p, so the likeliest always stays.
        cut = (before >= top_p * probs.sum(-1, keepdim=True)) & (top_p < 1)
        cut[:, 0] = False
        probs = probs.masked_fill(cut, 0.0)
    if any(row.params.min_p for row in rows):
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    cumulative = probs.double().cumsum(-1)
    target = noise * cumulative[:, -1:]
    # The first place whose cumulative mass exceeds the target: a token of probability zero is never it.
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=vocab_size - 1)
    drawn = place if order is None else order.gather(-1, place)
    return drawn[:, 0]
