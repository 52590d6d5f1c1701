"""The engine on a CUDA device: graphs replayed for other adapters each step, uploads beside them, quantised bases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterd.core import RequestId, SamplingParams
from adapterd.model.base import DeviceName
from adapterd.model.checkpoint import QuantizationName
from bench.gpu_trace import noted_replays
from tests.exactness.families import Reference, linear_names, save_adapter, save_model
from tests.exactness.test_families import GREEDY, PROMPT_LENGTHS, ROUTES, draw_prompt
from tests.exactness.test_int8 import write_out
from tests.offline import Offline, OfflineSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE: DeviceName = "cuda"
NUM_ADAPTERS = 8
NUM_RESIDENT = 2


@dataclass(frozen=True)
class Asked:
    """One request, and before which step it comes."""

    prompt: list[int]
    mix: Mapping[str, float]
    num_tokens: int
    step: int = 0


@dataclass
class Answers:
    """Steps an engine while requests come."""

    offline: Offline
    tokens: dict[RequestId, list[int]] = field(default_factory=dict)

    def of(self, asked: list[Asked]) -> list[list[int]]:
        ids: list[RequestId] = []
        step = 0
        while len(ids) < len(asked) or self.offline.engine.has_work():
            while len(ids) < len(asked) and asked[len(ids)].step <= step:
                each = asked[len(ids)]
                params = SamplingParams(max_tokens=each.num_tokens, temperature=0.0)
                ids.append(self.offline.submit(each.prompt, params, each.mix))
            for output in self.offline.engine.step():
                assert output.error is None
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            step += 1
        self.offline.run()  # the books balance
        return [self.tokens[request_id] for request_id in ids]


def prompt(number: int, length: int) -> list[int]:
    return torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(number)).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    save_model("llama", directory / "base")
    names = linear_names(directory / "base", "llama")
    for index in range(NUM_ADAPTERS):
        # Those of odd numbers take all that one of NUM_RESIDENT may take.
        targets, rank = (names, 8) if index % 2 else (names[: 1 + index // 2], 5)
        save_adapter(directory / "base", directory / f"a{index}", rank=rank, targets=targets, seed=index)
    return directory


def offline_of(root: Path, **more: Any) -> Offline:
    settings = OfflineSettings(
        base=str(root / "base"),
        device=DEVICE,
        max_num_seqs=12,
        adapter_memory=None,
        max_loras=NUM_RESIDENT,
        max_lora_rank=8,
        **more,
    )
    offline = Offline(settings)
    for index in range(NUM_ADAPTERS):
        offline.load(f"a{index}", root / f"a{index}")
    return offline


def alone(root: Path, asked: list[Asked]) -> list[list[int]]:
    """Each request by itself, through torch's own operators and without graphs."""
    offline = offline_of(root, kernels="torch")
    return [Answers(offline).of([each])[0] for each in (Asked(a.prompt, a.mix, a.num_tokens) for a in asked)]


def test_graphs_serve_whoever_comes(root: Path) -> None:
    """Batches of 1 to 9, adapters in other rows each step, two at once, and the base alone between them."""
    mixes: list[dict[str, float]] = [
        {},
        {"a1": 1.0},
        {"a2": 1.0},
        {"a1": 0.5, "a3": 0.75},
        {},
        {"a3": 1.0},
        {"a2": -1.0},
    ]
    asked = [Asked(prompt(i, 3 + 5 * i % 31), mixes[i % 7], 9 + i % 5, step=2 * i) for i in range(20)]
    asked += [Asked(prompt(20 + i, 12), {}, 8, step=80) for i in range(3)]
    offline = offline_of(root, kernels="triton")
    with noted_replays() as graphs:
        found = Answers(offline).of(asked)
    assert found == alone(root, asked)
    assert len(graphs) > 20
    assert len({id(graph) for graph in graphs}) >= 4  # sizes, with adapters and without


def test_uploads_beside_running_steps_change_nobodys_tokens(root: Path) -> None:
    """Twice as many adapters as there is room for come one after another while others decode."""
    others = [Asked(prompt(i, 20 + i), {"a0": 1.0} if i % 2 else {}, 60) for i in range(5)]
    newcomers = [
        Asked(prompt(50 + i, 10 + i), {f"a{1 + i % (NUM_ADAPTERS - 1)}": 1.0}, 4, step=3 + 3 * i)
        for i in range(14)
    ]
    asked = others + newcomers
    offline = offline_of(root, kernels="triton")
    found = Answers(offline).of(asked)
    assert found == alone(root, asked)
    stats = offline.engine.stats()
    assert stats.num_uploads >= NUM_ADAPTERS
    assert stats.num_evictions >= NUM_ADAPTERS - NUM_RESIDENT - 1


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_mixed_batch_over_8_bits_equals_peft_on_the_rounded_base(family: str, tmp_path: Path) -> None:
    base, rounded = tmp_path / "base", tmp_path / "rounded"
    save_model(family, base)
    write_out(base, rounded)
    names = linear_names(base, family)
    adapters = {name: tmp_path / name for name in ("wide", "narrow", "odd")}
    save_adapter(base, adapters["wide"], rank=8, targets=names, seed=1)
    save_adapter(base, adapters["narrow"], rank=2, targets=names[:1], seed=2)
    save_adapter(base, adapters["odd"], rank=5, targets=names[-2:], seed=3, use_rslora=True)
    references = {route: Reference(rounded, adapters[route] if route else None) for route in set(ROUTES)}
    offline = Offline(OfflineSettings(base=str(base), device=DEVICE, kernels="triton", quantization="int8"))
    for name, path in adapters.items():
        offline.load(name, path)
    generator = torch.Generator().manual_seed(7)
    expected = {}
    for length, route in zip(PROMPT_LENGTHS, ROUTES, strict=True):
        words, continuation = draw_prompt(references[route], length, generator)
        expected[offline.submit(words, GREEDY, {route: 1.0} if route else None)] = continuation.token_ids
    finished = offline.run()
    assert {request: finished[request, 0].token_ids for request in expected} == expected


def logprobs_by_offline(offline: Offline, words: list[int], mix: Mapping[str, float]) -> torch.Tensor:
    """float32 [len(words) - 1]: of each of the prompt's own tokens but the first."""
    offline.submit(words, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0), mix)
    outputs = []
    while offline.engine.has_work():
        outputs += offline.engine.step()
    entries = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in entries] == words[1:]
    return torch.tensor([entry.logprob for entry in entries])


def test_in_bfloat16_log_probabilities_stay_near_peft(root: Path) -> None:
    """Teacher-forced max |delta logprob| against float32: the bound of 0.1 that holds on a CPU."""
    offline = offline_of(root, kernels="triton", dtype="bfloat16")
    for mix in ({}, {"a1": 1.0}, {"a3": 1.0}):
        words = prompt(7, 120)
        found = logprobs_by_offline(offline, words, mix)
        adapter = root / next(iter(mix)) if mix else None
        logprobs = Reference(root / "base", adapter).logits(words).log_softmax(-1)
        expected = logprobs[torch.arange(119), torch.tensor(words[1:])]
        assert (found - expected).abs().max() <= 0.1


@pytest.mark.parametrize("quantization", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes_base_stays_near_peft_on_the_same(root: Path, quantization: QuantizationName) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "bnb-8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    )
    offline = offline_of(root, dtype="bfloat16", quantization=quantization)
    model = AutoModelForCausalLM.from_pretrained(
        root / "base", dtype=torch.bfloat16, quantization_config=config, device_map={"": DEVICE}
    )
    reference = PeftModel.from_pretrained(model, root / "a1").eval()
    words = prompt(9, 60)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([words], device=DEVICE), use_cache=False).logits[0]
    logprobs = logits.float().log_softmax(-1).cpu()
    expected = logprobs[torch.arange(59), torch.tensor(words[1:])]
    assert (logprobs_by_offline(offline, words, {"a1": 1.0}) - expected).abs().max() <= 0.1
