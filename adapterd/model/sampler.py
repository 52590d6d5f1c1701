"""From logits to tokens. What one row draws depends on its own logits, parameters, seed and place alone.

The randomness of a draw is one number, a hash of (seed, output index), turned into a token by the inverse of
the row's cumulative distribution: no generator has a state, so a batch's company cannot shift anyone's noise.
"""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from adapterd.core import SampledToken, SamplingParams, TokenLogprobs

_GREEDY_BELOW = 1e-5
"""Temperatures under this choose the likeliest token: dividing by them would overflow float32."""


@dataclass(frozen=True)
class SamplerRow:
    """One row to sample. `token_ids` is prompt then output; `suppressed_token_ids` may not be chosen yet."""

    params: SamplingParams
    seed: int
    token_ids: Seq[int]
    num_prompt_tokens: int
    suppressed_token_ids: frozenset[int]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1): a pure function of (seed, index)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Seq[SamplerRow]) -> list[SampledToken]:
    """logits: [num_rows, vocab_size], any float dtype -> one token a row.

    A row whose logits hold NaN or +inf, or leave nothing to choose, gets an error; its neighbours are untouched.
    """
    raw = logits.float()
    adjusted = _adjust(raw, rows)
    broken = ~(raw.amax(-1).isfinite() & adjusted.amax(-1).isfinite())
    chosen = _choose(adjusted, rows)
    logprobs = _chosen_logprobs(raw, rows, chosen)
    results = []
    for row, (token, bad) in enumerate(zip(chosen.tolist(), broken.tolist(), strict=True)):
        if bad:
            results.append(SampledToken(None, error="the logits are non-finite or leave no token"))
        else:
            results.append(SampledToken(token, logprobs.get(row)))
    return results


def logprobs_of(logits: torch.Tensor, token_ids: Seq[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """logits: [num_rows, vocab_size] -> what the raw distribution says of one given token a row."""
    log_probs = logits.float().log_softmax(-1)
    token = torch.tensor(token_ids, device=logits.device)[:, None]
    own = log_probs.gather(-1, token)
    ranks = (log_probs > own).sum(-1) + 1
    top_values, top_ids = log_probs.topk(min(num_top, log_probs.shape[-1]), dim=-1)
    return tuple(
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, rank, ids, values in zip(
            token_ids, own[:, 0].tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
        )
    )


def _chosen_logprobs(
    raw: torch.Tensor, rows: Seq[SamplerRow], chosen: torch.Tensor
) -> dict[int, TokenLogprobs]:
    wanted = [
        (index, row.params.logprobs) for index, row in enumerate(rows) if row.params.logprobs is not None
    ]
    if not wanted:
        return {}
    picked = torch.tensor([index for index, _ in wanted], device=raw.device)
    most = max(count for _, count in wanted)
    found = logprobs_of(raw[picked], chosen[picked].tolist(), most)
    return {
        index: TokenLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top[:count])
        for (index, count), entry in zip(wanted, found, strict=True)
    }


def _adjust(raw: torch.Tensor, rows: Seq[SamplerRow]) -> torch.Tensor:
    """Penalties, biases and suppressed tokens, on a copy of the rows that ask for them."""
    adjusted = raw
    for index, row in enumerate(rows):
        params = row.params
        penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        if not (penalised or params.logit_bias or row.suppressed_token_ids):
            continue
        if adjusted is raw:
            adjusted = raw.clone()
        line = adjusted[index]
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(row.token_ids)), device=raw.device)
            scores = line[seen]
            factor = params.repetition_penalty
            line[seen] = torch.where(scores > 0, scores / factor, scores * factor)
        if (params.presence_penalty or params.frequency_penalty) and row.num_output_tokens:
            output = torch.tensor(row.token_ids[row.num_prompt_tokens :], device=raw.device)
            tokens, counts = torch.unique(output, return_counts=True)
            line[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias:
            line[token] += bias
        if row.suppressed_token_ids:
            line[torch.tensor(sorted(row.suppressed_token_ids), device=raw.device)] = float("-inf")
    return adjusted


def _choose(logits: torch.Tensor, rows: Seq[SamplerRow]) -> torch.Tensor:
    """int64 [num_rows]: the likeliest token, or one drawn where a row has a temperature."""
    chosen = logits.argmax(-1)
    drawing = [index for index, row in enumerate(rows) if row.params.temperature >= _GREEDY_BELOW]
    # Sorted or not, the same noise finds another token: each row goes the way its own parameters ask for.
    for is_sorted in (False, True):
        members = [index for index in drawing if _needs_order(rows[index].params) == is_sorted]
        if members:
            picked = torch.tensor(members, device=logits.device)
            chosen[picked] = _draw(logits[picked], [rows[index] for index in members], is_sorted)
    return chosen


def _needs_order(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _draw(logits: torch.Tensor, rows: Seq[SamplerRow], is_sorted: bool) -> torch.Tensor:
    """Top-k, then top-p (both only if `is_sorted`), then min-p on the tempered distribution, then one draw a row."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device)
    probs = (logits / temperature[:, None]).softmax(-1)
    order = None
    if is_sorted:
        # Stable, so that equal probabilities keep the vocabulary's order whatever else is in the batch.
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        vocab_size = probs.shape[-1]
        top_k = torch.tensor([row.params.top_k or vocab_size for row in rows], device=device)
        top_p = torch.tensor([row.params.top_p for row in rows], device=device)
        probs = probs.masked_fill(torch.arange(vocab_size, device=device) >= top_k[:, None], 0.0)
        before = probs.cumsum(-1) - probs
        # A token stays while the mass before it is short of top_p, so the likeliest always stays.
        cut = (before >= top_p[:, None] * probs.sum(-1, keepdim=True)) & (top_p[:, None] < 1)
        cut[:, 0] = False
        probs = probs.masked_fill(cut, 0.0)
    if any(row.params.min_p for row in rows):
        min_p = torch.tensor([row.params.min_p for row in rows], device=device)
        probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0.0)
    cumulative = probs.double().cumsum(-1)
    noise = [uniform(row.seed, row.num_output_tokens) for row in rows]
    target = torch.tensor(noise, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    # The first place whose cumulative mass exceeds the target: a token of probability zero is never it.
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
    drawn = place if order is None else order.gather(-1, place)
    return drawn[:, 0]
