"""`a*0.7+b*0.3` equals PEFT's add_weighted_adapter(combination_type="cat"); what has no half is refused by name."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterd.composition import compose
from adapterd.core import SamplingParams
from adapterd.errors import InvalidRequest
from adapterd.model.kernels import KernelName
from adapterd.model_name import Part
from tests.dialect.making import save_base, save_peft
from tests.native_kernels import require_native_kernels
from tests.offline import Offline, OfflineSettings

# PEFT's: of tied weights, of saved embeddings, of patterns that it then applies all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)

NUM_TOKENS = 8
WEIGHTS = {"a": 0.7, "b": -0.4}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composition")
    save_base("qwen2", root / "base")
    for seed, name in enumerate("ab", 1):
        save_peft(
            root / "base",
            root / name,
            seed=seed,
            r=2 * seed,
            target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"],
        )
    return root


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composition")
    save_base("mixtral", root / "base")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    for seed, name in enumerate("ab", 1):
        save_peft(
            root / "base",
            root / name,
            seed=seed,
            r=3,
            target_modules=["q_proj"],
            target_parameters=parameters,
        )
    return root


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[int, ...]:
    token_ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            top = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-3
            token_ids.append(int(top.indices[0]))
    return tuple(token_ids[len(prompt) :])


def served(root: Path, kernels: KernelName, prompt: list[int]) -> dict[str, tuple[int, ...]]:
    """The mix beside each of its parts, in one batch."""
    if kernels == "native":
        require_native_kernels()
    offline = Offline(OfflineSettings(base=str(root / "base"), kernels=kernels, max_num_batched_tokens=16))
    for name in WEIGHTS:
        offline.load(name, root / name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    mixes = {"mix": WEIGHTS, "halved": {"a": 0.5}, "a": {"a": 1.0}}
    ids = {name: offline.submit(prompt, params, mix) for name, mix in mixes.items()}
    finished = offline.run()
    return {name: finished[request_id, 0].token_ids for name, request_id in ids.items()}


PROMPT = [5, 17, 99, 140, 3, 62, 8]


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_weighted_sum_equals_pefts_cat(qwen2: Path, kernels: KernelName) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        qwen2 / "base", dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, qwen2 / "a", adapter_name="a")
    model.load_adapter(qwen2 / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS.values()), "mix", combination_type="cat")
    model.add_weighted_adapter(["a"], [0.5], "halved", combination_type="cat")
    expected = {}
    for name in ("mix", "halved", "a"):
        model.set_adapter(name)
        expected[name] = greedy(model.eval(), PROMPT)
    assert served(qwen2, kernels, PROMPT) == expected
    assert len(set(expected.values())) == 3


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_weighted_sum_of_experts_equals_the_sum_of_pefts_deltas(mixtral: Path, kernels: KernelName) -> None:
    """PEFT's cat does not know how experts lie in a wrapped parameter, so its deltas are added by hand."""
    expected = {}
    for name, weights in {"mix": WEIGHTS, "halved": {"a": 0.5}, "a": {"a": 1.0}}.items():
        sums: dict[str, torch.Tensor] = {}
        for adapter, weight in weights.items():
            base = AutoModelForCausalLM.from_pretrained(mixtral / "base", dtype=torch.float32)
            model = PeftModel.from_pretrained(base, mixtral / adapter)
            before = {key: value.clone() for key, value in before_merge(mixtral).items()}
            merged = model.merge_and_unload().state_dict()
            for key, value in merged.items():
                sums[key] = sums.get(key, before[key]) + weight * (value - before[key])
        base = AutoModelForCausalLM.from_pretrained(
            mixtral / "base", dtype=torch.float32, attn_implementation="eager"
        )
        base.load_state_dict(sums)
        expected[name] = greedy(base.eval(), PROMPT)
    assert served(mixtral, kernels, PROMPT) == expected


def before_merge(root: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        root / "base", dtype=torch.float32
    ).state_dict()
    return state


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("bias", {"bias": "all"}),
        ("lora_bias", {"lora_bias": True}),
        ("use_dora", {"use_dora": True}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices", {"trainable_token_indices": [3, 5]}),
    ],
)
def test_what_has_no_half_refuses_the_mix_by_name(
    field: str, config: dict[str, object], qwen2: Path, tmp_path: Path
) -> None:
    save_peft(qwen2 / "base", tmp_path / "c", seed=3, target_modules=["q_proj"], **config)
    offline = Offline(OfflineSettings(base=str(qwen2 / "base"), kernels="torch"))
    offline.load("a", qwen2 / "a")
    offline.load("c", tmp_path / "c")
    spec, a, c = offline.base.spec, offline.adapters["a"], offline.adapters["c"]
    assert compose(spec, [Part("c", None, 1.0)], [c]).mix == ((c.id, 1.0),)
    for parts, adapters in (
        ([Part("a", None, 1.0), Part("c", None, 1.0)], [a, c]),
        ([Part("c", None, 0.5)], [c]),
    ):
        with pytest.raises(InvalidRequest, match=rf"'c' was trained with {field}"):
            compose(spec, parts, adapters)
