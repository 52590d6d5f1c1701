"""Over a base in 8 bits, greedy in float32: PEFT's own tokens over the same base with the rounded weights written out.

PEFT keeps its matrices in float32 and knows nothing of our rounding, so both compute on the same numbers.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterd.core import SamplingParams
from adapterd.model.int8 import Int8Linear, quantize_linears
from adapterd.model.kernels import KernelName
from tests.exactness.families import Reference, linear_names, save_adapter, save_model
from tests.exactness.test_families import GREEDY, PROMPT_LENGTHS, ROUTES, draw_prompt
from tests.native_kernels import require_native_kernels
from tests.offline import Offline, OfflineSettings


def write_out(base: Path, directory: Path) -> None:
    """The base with each linear's weight as 8 bits make it, in float32; a tied head has its own from now on."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantize_linears(model)
    weights = {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, Int8Linear)
    }
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.config.tie_word_embeddings = False
    plain.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    plain.load_state_dict(weights, strict=False)
    plain.save_pretrained(directory)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "mixtral"])
def test_mixed_batch_equals_peft_on_the_rounded_base(
    family: str, kernels: KernelName, tmp_path: Path
) -> None:
    if kernels == "native":
        require_native_kernels()
    base, rounded = tmp_path / "base", tmp_path / "rounded"
    save_model(family, base)
    write_out(base, rounded)
    names = linear_names(base, family)
    adapters: dict[str | None, Path | None] = {name: tmp_path / name for name in ("wide", "narrow", "odd")}
    save_adapter(base, tmp_path / "wide", rank=8, targets=names, seed=1)
    save_adapter(base, tmp_path / "narrow", rank=2, targets=names[:1], seed=2)
    save_adapter(base, tmp_path / "odd", rank=5, targets=names[-2:], seed=3, use_rslora=True)
    references = {route: Reference(rounded, adapters.get(route)) for route in set(ROUTES)}
    offline = Offline(
        OfflineSettings(base=str(base), kernels=kernels, quantization="int8", max_num_batched_tokens=16)
    )
    for name, path in adapters.items():
        assert name is not None
        assert path is not None
        offline.load(name, path)
    generator = torch.Generator().manual_seed(7)
    expected = {}
    for length, route in zip(PROMPT_LENGTHS, ROUTES, strict=True):
        prompt, continuation = draw_prompt(references[route], length, generator)
        request = offline.submit(prompt, GREEDY, {route: 1.0} if route else None)
        expected[request] = continuation.token_ids
    finished = offline.run()
    assert {request: finished[request, 0].token_ids for request in expected} == expected


def test_in_bfloat16_log_probabilities_stay_near_peft_on_the_rounded_base(tmp_path: Path) -> None:
    """Teacher-forced max |delta logprob| against float32, as for bases of 16 bits: the same bound of 0.1."""
    require_native_kernels()
    base, rounded = tmp_path / "base", tmp_path / "rounded"
    save_model("gemma2", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)  # what is rounded to 8 bits is what a server of bfloat16 would round
    write_out(base, rounded)
    save_adapter(base, tmp_path / "wide", rank=8, targets=linear_names(base, "gemma2"), seed=1)
    offline = Offline(OfflineSettings(base=str(base), dtype="bfloat16", quantization="int8"))
    offline.load("wide", tmp_path / "wide")
    prompt = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    offline.submit(prompt, params, {"wide": 1.0})
    outputs = []
    while offline.engine.has_work():
        outputs += offline.engine.step()
    entries = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in entries] == prompt[1:]
    logprobs = Reference(rounded, tmp_path / "wide").logits(prompt).log_softmax(-1)
    wanted = logprobs[torch.arange(39), torch.tensor(prompt[1:])]
    found = torch.tensor([entry.logprob for entry in entries])
    assert (found - wanted).abs().max() <= 0.1
