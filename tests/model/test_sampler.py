"""Every rule of sampling against the rule written out plainly; a draw depends on its own row alone."""

import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch

from adapterd.core import SampledToken, SamplingParams
from adapterd.model.sampler import SamplerRow, start_logprobs, start_sampling, uniform
from adapterd.model.transfer import Readback
from adapterd.token_counts import TokenCounts
from tests.largest_tensor import LargestTensor

VOCAB_SIZE = 24
FREE = SamplingParams(max_tokens=8)


def row(
    params: SamplingParams = FREE,
    *,
    seed: int = 0,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    suppressed: Sequence[int] = (),
) -> SamplerRow:
    counts = TokenCounts()
    counts.update([*prompt, *output], len(prompt))
    return SamplerRow(params, seed, counts, len(output), frozenset(suppressed))


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
    readback = Readback(logits.device)
    sampling = start_sampling(logits, rows, readback)
    readback.close()
    readback.wait()
    return sampling.results()


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def probabilities(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """The distribution to draw from, one rule after the other, unnormalised."""
    exps = [math.exp(value / params.temperature) for value in logits]
    probs = [value / sum(exps) for value in exps]
    likeliest_first = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = likeliest_first[: params.top_k or len(probs)]
    if params.top_p < 1:
        total, mass, nucleus = sum(probs[token] for token in kept), 0.0, []
        for token in kept:
            if nucleus and mass >= params.top_p * total:
                break
            nucleus.append(token)
            mass += probs[token]
        kept = nucleus
    kept = [token for token in kept if probs[token] >= params.min_p * max(probs)]
    return [prob if token in kept else 0.0 for token, prob in enumerate(probs)]


def token_of(result: SampledToken) -> int:
    assert result.token_id is not None
    return result.token_id


RULES = {
    "plain": replace(FREE, temperature=1.3),
    "cold": replace(FREE, temperature=0.4),
    "top_k": replace(FREE, top_k=3),
    "top_p": replace(FREE, top_p=0.6),
    "min_p": replace(FREE, min_p=0.15),
    "all": replace(FREE, temperature=1.5, top_k=9, top_p=0.8, min_p=0.1),
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_draws_follow_the_rules_distribution(rule: str) -> None:
    """Pearson's chi-square over 4000 fixed seeds; 99.9 % quantile by Wilson and Hilferty."""
    params, num_draws = RULES[rule], 4000
    logits = random_logits(1, seed=3)
    expected = probabilities(logits[0].tolist(), params)
    rows = [row(params, seed=seed) for seed in range(num_draws)]
    counts = Counter(token_of(result) for result in sample(logits.expand(num_draws, -1), rows))
    support = [token for token, prob in enumerate(expected) if prob > 0]
    assert set(counts) <= set(support)
    assert len(support) > 1
    total = sum(expected)
    wanted = {token: num_draws * expected[token] / total for token in support}
    rare = [token for token in support if wanted[token] < 5]
    cells = [(counts[token], wanted[token]) for token in support if token not in rare]
    if rare:
        cells.append((sum(counts[t] for t in rare), sum(wanted[t] for t in rare)))
    statistic = sum((seen - want) ** 2 / want for seen, want in cells)
    freedom = len(cells) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile


@pytest.mark.parametrize("rule", sorted(RULES))
def test_support_is_exactly_what_the_rule_leaves(rule: str) -> None:
    """Noise on both sides of every step of the cumulative distribution finds each token left, and no other."""
    logits = random_logits(6, seed=5)
    for line in logits:
        expected = probabilities(line.tolist(), RULES[rule])
        left = {token for token, prob in enumerate(expected) if prob > 2e-3 * sum(expected)}
        rows = [row(RULES[rule], seed=seed) for seed in range(6000)]
        drawn = {token_of(result) for result in sample(line.expand(len(rows), -1), rows)}
        assert left <= drawn
        assert all(expected[token] > 0 for token in drawn)


def test_company_and_order_change_no_draw() -> None:
    """Regression: a row without top_k or top_p was drawn from the sorted distribution beside one that had them."""
    logits = random_logits(48, seed=1)
    rules = [*RULES.values(), replace(FREE, temperature=0.0), replace(FREE, presence_penalty=1.0)]
    rows = [row(rules[i % len(rules)], seed=100 + i, output=[2] * (i % 5)) for i in range(48)]
    rows = [replace(r, params=replace(r.params, logprobs=2)) for r in rows]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(48)]
    generator = random.Random(0)
    for _ in range(20):
        company = generator.sample(range(48), generator.randint(2, 48))
        assert sample(logits[company], [rows[i] for i in company]) == [alone[i] for i in company]


def test_noise_is_a_function_of_seed_and_output_index() -> None:
    logits = random_logits(1).expand(64, -1)
    by_index = [row(seed=5, output=[3] * index) for index in range(64)]
    first = [token_of(result) for result in sample(logits, by_index)]
    assert first == [token_of(result) for result in sample(logits, by_index)]
    assert len(set(first)) > 3  # the index moves the noise
    assert (
        len({token_of(r) for r in sample(logits, [row(seed=s) for s in range(64)])}) > 3
    )  # and so does the seed
    assert (
        0 <= min(uniform(s, 0) for s in range(500)) < 0.01 < 0.99 < max(uniform(s, 0) for s in range(500)) < 1
    )


def test_greedy_takes_the_likeliest_and_so_does_a_temperature_near_zero() -> None:
    logits = random_logits(5) * 1e3
    for temperature in (0.0, 1e-6, 1e-4):
        rows = [row(replace(FREE, temperature=temperature), seed=seed) for seed in range(5)]
        assert [token_of(result) for result in sample(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 24, 512, 513, 1024, 2000])
def test_likeliest_is_the_first_of_the_greatest_in_any_vocabulary(
    vocab_size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(40, vocab_size, generator=generator).to(dtype)
    logits[:5] = logits[:5].round()  # ties
    logits[5, -1] = 99
    greedy = row(replace(FREE, temperature=0.0))
    found = [token_of(result) for result in sample(logits, [greedy] * 40)]
    assert found == [line.index(max(line)) for line in logits.tolist()]
    for place in {0, vocab_size // 2, vocab_size - 1}:
        logits[:, place] = float("nan")
        assert all(result.error for result in sample(logits, [greedy] * 40))
        logits[:, place] = -1.0


def penalised(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    found = list(logits)
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        found[token] = found[token] / factor if found[token] > 0 else found[token] * factor
    for token, count in Counter(output).items():
        found[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        found[token] += bias
    return found


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.8),
        SamplingParams(max_tokens=8, temperature=0.0, presence_penalty=1.5),
        SamplingParams(max_tokens=8, temperature=0.0, frequency_penalty=-1.5),
        SamplingParams(max_tokens=8, temperature=0.0, logit_bias=((4, 3.0), (7, -100.0))),
        SamplingParams(
            max_tokens=8, temperature=0.0, repetition_penalty=0.7, presence_penalty=-0.5, frequency_penalty=0.4,
            logit_bias=((0, 1.0),),
        ),
    ],
)  # fmt: skip
def test_penalties_and_bias_choose_as_the_plain_rule_does(params: SamplingParams) -> None:
    generator = random.Random(2)
    changed = 0
    for seed in range(60):
        logits = random_logits(1, seed=seed)
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(6)]
        output = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randrange(9))]
        expected = penalised(logits[0].tolist(), params, prompt, output)
        plain = int(logits.argmax())
        found = token_of(sample(logits, [row(params, prompt=prompt, output=output)])[0])
        assert expected[found] == pytest.approx(max(expected), abs=1e-5)
        changed += found != plain
    assert changed > 5


def test_penalties_bias_and_suppression_of_one_token_add_up() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    params = replace(FREE, temperature=0.0, presence_penalty=2.0, logit_bias=((3, 5.0), (4, 4.0), (5, 3.5)))
    once = row(params, prompt=(5,), output=(3,))
    suppressed = row(params, prompt=(5,), output=(3,), suppressed=(3, 4))
    # 3 has been put out: 5 - 2. 4 is new, and 5 stands in the prompt alone: no penalty.
    assert [token_of(result) for result in sample(logits, [once, suppressed])] == [4, 5]


@pytest.mark.parametrize(
    "params",
    [replace(FREE, repetition_penalty=1.3), replace(FREE, presence_penalty=0.5, frequency_penalty=0.1)],
)
def test_penalties_cost_as_much_for_the_thousandth_token_as_for_the_first(params: SamplingParams) -> None:
    """Regression: every step counted all tokens anew. Lines of our own are counted, not seconds."""
    logits = torch.zeros(1, VOCAB_SIZE)

    def num_lines(num_tokens: int) -> int:
        lines = 0

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal lines
            if not frame.f_globals.get("__name__", "").startswith("adapterd."):
                return None
            lines += event == "line"
            return trace

        counts, tokens, before = TokenCounts(), [1, 2, 3], sys.gettrace()
        sys.settrace(trace)
        try:
            for index in range(num_tokens):
                counts.update(tokens, 3)
                token = sample(logits, [SamplerRow(params, 0, counts, index, frozenset())])[0]
                tokens.append(token_of(token))
        finally:
            sys.settrace(before)
        return lines

    num_lines(1)  # what runs only once
    few = num_lines(200)
    assert few > 200
    assert num_lines(400) <= 2.1 * few


def test_suppressed_tokens_are_never_chosen() -> None:
    logits = random_logits(1)
    suppressed = logits[0].topk(5).indices.tolist()
    rows = [row(seed=seed, suppressed=suppressed) for seed in range(500)]
    rows.append(row(replace(FREE, temperature=0.0), suppressed=suppressed))
    drawn = [token_of(result) for result in sample(logits.expand(501, -1), rows)]
    assert not set(drawn) & set(suppressed)
    assert drawn[-1] == logits[0].topk(6).indices[5].item()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_row_of_broken_logits_errs_and_its_neighbours_are_untouched(poison: float, rule: str) -> None:
    logits = random_logits(3)
    rows = [row(replace(RULES[rule], logprobs=1), seed=seed) for seed in range(3)]
    sound = sample(logits, rows)
    logits[1, 5] = poison
    found = sample(logits, rows)
    assert [found[0], found[2]] == [sound[0], sound[2]]
    assert found[1].token_id is None
    assert "non-finite" in (found[1].error or "")


def test_row_with_nothing_left_to_choose_errs() -> None:
    """Regression: it chose a suppressed token."""
    params = replace(FREE, temperature=0.0)
    found = sample(random_logits(2), [row(params, suppressed=range(VOCAB_SIZE)), row(params)])
    assert found[0].token_id is None
    assert found[0].error
    assert found[1].error is None


def test_logprobs_are_of_the_raw_distribution_with_rank_and_alternatives() -> None:
    logits = random_logits(3)
    raw = logits.double().log_softmax(-1)
    params = replace(FREE, temperature=0.3, top_k=2, logit_bias=((11, 50.0),))
    rows = [row(replace(params, logprobs=count), seed=9) for count in (0, 4)] + [row(params)]
    found = sample(logits, rows)
    assert found[2].logprobs is None
    for index, count in enumerate((0, 4)):
        entry = found[index].logprobs
        assert entry is not None
        assert entry.token_id == token_of(found[index]) == 11
        assert entry.logprob == pytest.approx(raw[index, 11].item(), abs=1e-5)
        assert entry.rank == 1 + int((raw[index] > raw[index, 11]).sum())
        likeliest = raw[index].topk(count)
        assert [token for token, _ in entry.top] == likeliest.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)


def test_logprobs_of_given_tokens_may_ask_for_more_alternatives_than_there_are_tokens() -> None:
    logits = random_logits(2)
    found = start_logprobs(logits, torch.tensor([3, 20]), [100, 100], Readback(logits.device)).entries()
    assert [len(entry.top) for entry in found] == [VOCAB_SIZE, VOCAB_SIZE]
    assert [entry.logprob for entry in found] == pytest.approx(
        [dict(entry.top)[entry.token_id] for entry in found]
    )
    assert [list(dict(entry.top)).index(entry.token_id) + 1 for entry in found] == [
        entry.rank for entry in found
    ]


def test_logprobs_of_many_rows_are_those_of_each_and_take_bounded_memory() -> None:
    """Regression: a whole chunk of a prompt was turned to float32 at once, and its log probabilities beside it."""
    num_rows, vocab_size = 48, 300_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator).bfloat16()
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    readback = Readback(logits.device)
    with LargestTensor() as largest:
        found = start_logprobs(logits, token_ids, [3] * num_rows, readback)
    assert largest.num_bytes <= 32 << 20
    each = [
        start_logprobs(logits[row, None], token_ids[row, None], [3], readback).entries()[0]
        for row in range(num_rows)
    ]
    assert list(found.entries()) == each
