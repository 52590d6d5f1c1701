"""The runner's logits are transformers' own: of the rows asked for, in any chunks, in every dtype within its bound."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapterd.core import RequestId, SamplingParams, TokenLogprobs
from adapterd.model.kv import kv_block_bytes
from tests.exactness.families import COMMON, Reference, linear_names, save_adapter, save_model
from tests.largest_tensor import LargestTensor
from tests.offline import Offline, OfflineSettings

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=2)
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3)
PROMPTS = {None: list(range(3, 40)), "a": list(range(80, 127)), "b": [7] * 21}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """A base (under None) and two adapters."""
    root = tmp_path_factory.mktemp("runner")
    save_model("gemma2", root / "base")
    names = linear_names(root / "base", "gemma2")
    save_adapter(root / "base", root / "a", rank=8, targets=names, seed=1)
    save_adapter(root / "base", root / "b", rank=3, targets=names[:2], seed=2)
    return {None: root / "base", "a": root / "a", "b": root / "b"}


def start(directories: dict[str | None, Path], **settings: Any) -> Offline:
    offline = Offline(OfflineSettings(base=str(directories[None]), **settings))
    for name in ("a", "b"):
        offline.load(name, directories[name])
    return offline


def run(offline: Offline) -> dict[RequestId, list[TokenLogprobs]]:
    """Prompt logprobs, then those of the answer, by request."""
    found: dict[RequestId, list[TokenLogprobs]] = {}
    while offline.engine.has_work():
        for output in offline.engine.step():
            assert output.error is None
            found.setdefault(output.request_id, []).extend([*output.prompt_logprobs, *output.logprobs])
    return found


@pytest.fixture(scope="module")
def expected(directories: dict[str | None, Path]) -> dict[str | None, torch.Tensor]:
    """Log probabilities by transformers and PEFT, [num_tokens, vocab_size], for each prompt."""
    return {
        name: Reference(directories[None], directories[name] if name else None).logits(prompt).log_softmax(-1)
        for name, prompt in PROMPTS.items()
    }


def score_all(offline: Offline, params: SamplingParams = SCORED) -> dict[str | None, list[TokenLogprobs]]:
    ids = {
        name: offline.submit(prompt, params, {name: 1.0} if name else None)
        for name, prompt in PROMPTS.items()
    }
    found = run(offline)
    return {name: found[request_id] for name, request_id in ids.items()}


@pytest.mark.parametrize("max_num_batched_tokens", [512, 10])
def test_prompt_logprobs_are_transformers_own_in_any_chunks(
    directories: dict[str | None, Path], expected: dict[str | None, torch.Tensor], max_num_batched_tokens: int
) -> None:
    found = score_all(start(directories, max_num_batched_tokens=max_num_batched_tokens))
    for name, prompt in PROMPTS.items():
        entries = found[name]
        assert [entry.token_id for entry in entries] == prompt[1:]
        for row, entry in enumerate(entries):
            log_probs = expected[name][row]
            assert entry.logprob == pytest.approx(log_probs[entry.token_id].item(), abs=2e-4)
            likeliest = log_probs.topk(2)
            assert [value for _, value in entry.top] == pytest.approx(likeliest.values.tolist(), abs=2e-4)
            assert abs(entry.rank - 1 - int((log_probs > log_probs[entry.token_id]).sum())) <= 1


def test_preempted_prompt_is_scored_once_and_the_same(directories: dict[str | None, Path]) -> None:
    params = replace(SCORED, max_tokens=24, temperature=0.0, logprobs=0)
    roomy = start(directories)
    block_bytes = kv_block_bytes(roomy.base.kv_shapes, roomy.base.dtype)
    tight = start(directories, kv_memory=9 * block_bytes)
    wanted, found = score_all(roomy, params), score_all(tight, params)
    assert roomy.engine.stats().num_preemptions == 0
    assert tight.engine.stats().num_preemptions > 0
    for name, prompt in PROMPTS.items():
        assert [e.token_id for e in found[name]] == [e.token_id for e in wanted[name]]
        assert len(found[name]) == len(prompt) - 1 + 24
        assert [e.logprob for e in found[name]] == pytest.approx([e.logprob for e in wanted[name]], abs=1e-4)


# Greatest |difference| of a log probability from float32, teacher-forced over 102 tokens. Measured 0.047 and 0.0048:
# about a factor of eight apart, as float16's three more bits of mantissa should give; the bounds leave a factor of two.
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_16_bit_log_probabilities_stay_within_their_bound_of_float32(
    directories: dict[str | None, Path], expected: dict[str | None, torch.Tensor], dtype: Any, bound: float
) -> None:
    found = score_all(start(directories, dtype=dtype, max_num_batched_tokens=48))
    worst = max(
        abs(entry.logprob - expected[name][row, entry.token_id].item())
        for name in PROMPTS
        for row, entry in enumerate(found[name])
    )
    assert 0 < worst < bound


def test_head_computes_the_rows_that_are_wanted_and_no_other(directories: dict[str | None, Path]) -> None:
    offline = start(directories, max_num_batched_tokens=16)
    offline.bring("a")
    num_rows: list[int] = []
    head = offline.base.model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda module, args, output: num_rows.append(args[0].shape[-2]))
    offline.submit(range(40), GREEDY)
    for _ in range(3):
        offline.engine.step()
    assert num_rows == [1, 1, 1]  # nothing wanted twice (a model must be given some row), then the last
    offline.submit(range(5), GREEDY, {"a": 1.0})
    offline.submit(range(8), SCORED)
    num_rows.clear()
    offline.engine.step()
    assert num_rows == [1 + 1 + 8]
    offline.run()


def test_chosen_tokens_carry_the_raw_log_probabilities_of_the_reference(
    directories: dict[str | None, Path],
) -> None:
    offline = start(directories)
    request = offline.submit(PROMPTS["a"], GREEDY, {"a": 1.0})
    finished = offline.run()[request, 0]
    log_probs = (
        Reference(directories[None], directories["a"])
        .logits([*PROMPTS["a"], *finished.token_ids])
        .log_softmax(-1)
    )
    rows = log_probs[len(PROMPTS["a"]) - 1 :]
    for row, token, entry in zip(rows, finished.token_ids, finished.logprobs, strict=False):
        assert entry.token_id == token == row.argmax()
        assert entry.rank == 1
        assert [value for _, value in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=2e-4)


def test_seeded_answers_do_not_change_with_their_company(directories: dict[str | None, Path]) -> None:
    """Bit for bit in float32, where a row's logits differ by some 1e-6 with the batch and a draw seldom notices."""
    params = [
        SamplingParams(max_tokens=6, seed=1, temperature=0.8),
        SamplingParams(max_tokens=6, seed=2, temperature=1.2, top_p=0.9),
        SamplingParams(max_tokens=6, seed=3, top_k=20, min_p=0.01),
    ]
    alone = []
    for one, (name, prompt) in zip(params, PROMPTS.items(), strict=True):
        offline = start(directories)
        request = offline.submit(prompt, one, {name: 1.0} if name else None)
        alone.append(offline.run()[request, 0].token_ids)
    offline = start(directories, max_num_batched_tokens=20)
    ids = [
        offline.submit(prompt, one, {name: 1.0} if name else None)
        for one, (name, prompt) in zip(params, PROMPTS.items(), strict=True)
    ]
    finished = offline.run()
    assert [finished[request, 0].token_ids for request in ids] == alone


def test_composed_adapters_add_up_as_their_weights_do(directories: dict[str | None, Path]) -> None:
    """0.6 a + 0.4 b against the base with both changes merged into its weights."""
    offline = start(directories)
    request = offline.submit(PROMPTS["b"], SCORED, {"a": 0.6, "b": 0.4})
    found = run(offline)[request]
    merged = Reference(directories[None])
    with torch.no_grad():
        for name, factor in (("a", 0.6), ("b", 0.4)):
            for m in offline.adapters[name].modules:
                merged._model.get_submodule(m.module).weight += factor * m.scale * m.b.float() @ m.a.float()
    log_probs = merged.logits(PROMPTS["b"]).log_softmax(-1)
    for row, entry in enumerate(found):
        assert entry.logprob == pytest.approx(log_probs[row, entry.token_id].item(), abs=5e-4)


def test_scoring_a_long_prompt_over_a_large_vocabulary_takes_bounded_memory(tmp_path: Path) -> None:
    """Regression: the logits of a whole chunk of it lay in memory at once; here 480 MB in place of 128 MiB."""
    config = LlamaConfig(
        **{
            **COMMON,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": 300_000,
            "max_position_embeddings": 512,
        }
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    offline = Offline(OfflineSettings(base=str(tmp_path), kv_memory=1 << 20))
    prompt = list(range(400))
    request = offline.submit(prompt, replace(SCORED, max_tokens=1))
    with LargestTensor() as largest:
        finished = offline.run()[request, 0]
    assert largest.num_bytes <= 128 << 20
    assert [entry.token_id for entry in finished.prompt_logprobs] == prompt[1:]
