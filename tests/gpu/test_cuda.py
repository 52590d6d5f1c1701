"""The same engine on a CUDA device: PEFT's own tokens in float32; and its memory. One command: `pytest tests/gpu`."""

from pathlib import Path

import pytest
import torch

from adapterd.core import SamplingParams
from adapterd.model.device_memory import free_bytes
from tests.exactness.families import Reference, linear_names, save_adapter, save_model
from tests.offline import Offline, OfflineSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 10
PROMPTS = [list(range(3, 3 + length)) for length in (19, 33, 5, 26)]
ROUTES = [None, "wide", "narrow", "wide"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt-oss", "phi3"])
def test_mixed_batch_on_cuda_equals_peft(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(family, base)
    names = linear_names(base, family)
    save_adapter(base, tmp_path / "wide", rank=8, targets=names, seed=1)
    save_adapter(base, tmp_path / "narrow", rank=2, targets=names[:1], seed=2)
    offline = Offline(OfflineSettings(base=str(base), device="cuda", max_num_batched_tokens=16))
    for name in ("wide", "narrow"):
        offline.load(name, tmp_path / name)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    ids = [
        offline.submit(prompt, greedy, {route: 1.0} if route else None)
        for prompt, route in zip(PROMPTS, ROUTES, strict=True)
    ]
    finished = offline.run()
    for request_id, prompt, route in zip(ids, PROMPTS, ROUTES, strict=True):
        expected = Reference(base, tmp_path / route if route else None).greedy(prompt, NUM_TOKENS)
        assert expected.margin > 5e-4, "choose another seed: the reference is near a tie"
        assert finished[request_id, 0].token_ids == expected.token_ids


def test_memory_of_tensors_that_are_gone_counts_as_free() -> None:
    device = torch.device("cuda")
    before = free_bytes(device)
    torch.empty(1 << 30, dtype=torch.uint8, device=device)  # gone at once, and torch keeps its memory
    assert free_bytes(device) > before - (1 << 29)
