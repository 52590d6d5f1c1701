"""What is loaded is what the directory holds; everything else is refused, naming what is wrong and the way out."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from adapterd.core import SamplingParams
from adapterd.errors import BaseRefused
from adapterd.model.base import base_of, load_base
from adapterd.model.checkpoint import load_weights
from adapterd.model.find import find_base
from adapterd.model.kernels import KernelName
from adapterd.model.lora import LoraLinear
from adapterd.stages import Stages
from tests.exactness.families import COMMON, linear_names, save_adapter, save_model
from tests.native_kernels import require_native_kernels
from tests.offline import Offline, OfflineSettings

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj"
GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model("llama", directory)
    return directory


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def only_pickles(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def cut_short(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:5000])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda directory: (directory / "config.json").unlink(), r"config\.json cannot be used"),
        (lambda directory: (directory / "config.json").write_text("{"), r"config\.json cannot be used"),
        (change_config(model_type="nonsense"), "nonsense"),
        (change_config(hidden_size="wide"), "hidden_size"),
        (change_config(num_attention_heads=5), "attention heads"),
        (change_config(quantization_config={"quant_method": "fp8"}), "quantised checkpoint"),
        (only_pickles, r"no \*\.safetensors"),
        (cut_short, "cannot be loaded"),
        (change_tensors(lambda t: t.pop(f"{Q_PROJ}.weight")), rf"lacks 1 tensors, {Q_PROJ}\.weight"),
        (change_tensors(lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(3, 3)})), "cannot be loaded"),
        (change_tensors(lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(64)})), rf"holds {Q_PROJ}\.bias"),
    ],
)
def test_directory_that_is_not_whole_is_refused(
    llama: Path, tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    """Regression: a missing tensor was filled with random numbers and served."""
    directory = tmp_path / "broken"
    shutil.copytree(llama, directory)
    break_it(directory)
    with pytest.raises(BaseRefused, match=message) as refused:
        load_base(str(directory), device="cpu")
    assert str(directory) in str(refused.value)


def test_tensors_of_parts_that_the_decoder_lacks_may_stay_out(llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "with_tower"
    shutil.copytree(llama, directory)
    change_tensors(lambda t: t.update({"vision_tower.conv.weight": torch.ones(2)}))(directory)
    assert load_base(str(directory), device="cpu").spec.name == "with_tower"


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=32, d_model=16).save_pretrained(tmp_path)
    with pytest.raises(BaseRefused, match=r"encoder-decoder \(t5\)"):
        load_base(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/there", "a/b/c", "my models/llama"])
def test_name_that_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(BaseRefused, match="no such directory"):
        find_base(name)


def test_hub_id_that_cannot_be_fetched_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseRefused, match="'nobody/nothing' could not be fetched"):
        find_base("nobody/nothing")


def test_mini_is_the_directory_in_the_package_and_a_directory_is_itself(tmp_path: Path) -> None:
    assert (find_base("mini") / "config.json").is_file()
    (tmp_path / "link").symlink_to(tmp_path)
    assert find_base(str(tmp_path / "link")) == tmp_path.resolve()


def test_spec_says_what_the_directory_holds(llama: Path) -> None:
    base = load_base(str(llama), served_name="tiny", device="cpu")
    spec = base.spec
    assert (spec.name, spec.root, spec.architecture) == ("tiny", str(llama), "LlamaForCausalLM")
    assert (spec.vocab_size, spec.max_model_len, spec.dtype) == (160, 256, "float32")
    assert spec.lora_targets[f"{Q_PROJ}"] == (64, 64)
    assert spec.lora_targets["model.layers.0.mlp.down_proj"] == (64, 96)
    assert len(spec.lora_targets) == 3 * 7
    assert "lm_head" not in spec.lora_targets
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {path for path, m in base.model.named_modules() if isinstance(m, LoraLinear)} == set(
        spec.lora_targets
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_weights_keys_and_adapter_memory(llama: Path, dtype: Any) -> None:
    offline = Offline(OfflineSettings(base=str(llama), dtype=dtype))
    assert offline.base.spec.dtype == dtype
    assert {str(p.dtype) for p in offline.base.model.parameters()} == {f"torch.{dtype}"}
    assert {str(keys.dtype) for keys in offline.runner.kv.keys.values()} == {f"torch.{dtype}"}
    request = offline.submit([1, 2, 3], GREEDY)
    assert len(offline.run()[request, 0].token_ids) == 3


def test_small_16_bit_checkpoint_is_computed_in_float32_on_a_cpu_and_loses_nothing(
    llama: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "halved"
    shutil.copytree(llama, directory)
    change_config(dtype="bfloat16")(directory)
    change_tensors(lambda t: t.update({k: v.bfloat16() for k, v in list(t.items())}))(directory)
    base = load_base(str(directory), device="cpu")
    assert base.spec.dtype == "float32"
    wanted = load_file(directory / WEIGHTS)[f"{Q_PROJ}.weight"].float()
    assert torch.equal(base.model.get_submodule(Q_PROJ).inner.weight, wanted)


def test_context_may_be_shorter_but_not_longer_than_the_bases(llama: Path) -> None:
    assert load_base(str(llama), device="cpu", max_model_len=100).spec.max_model_len == 100
    with pytest.raises(BaseRefused, match="--max-model-len 257 exceeds the base's 256 tokens"):
        load_base(str(llama), device="cpu", max_model_len=257)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_cuda_without_a_device_is_refused(llama: Path) -> None:
    with pytest.raises(BaseRefused, match="no CUDA device"):
        load_base(str(llama), device="cuda")


def test_end_of_sequence_ids_are_the_generation_configs_then_the_configs(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "eos_token_id": 5, "num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    for ids, expected in (([7, 9], {7, 9}), (8, {8}), (None, {5})):
        file.write_text(json.dumps({"eos_token_id": ids}))
        assert load_base(str(tmp_path), device="cpu").spec.eos_token_ids == expected


class CountOperators(TorchDispatchMode):
    """Everything torch is asked to compute, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_base_traffic_pays_nothing_for_adapters(llama: Path, tmp_path: Path) -> None:
    """A batch of the base alone asks torch for the same operators whether adapters are resident or none ever was."""
    save_adapter(llama, tmp_path, rank=4, targets=linear_names(llama, "llama"), seed=1)

    def operators_of_a_base_step(offline: Offline) -> Counter[str]:
        offline.submit([5, 6, 7], GREEDY)
        with CountOperators() as counted:
            offline.engine.step()
        offline.run()
        return counted.counts

    never = operators_of_a_base_step(Offline(OfflineSettings(base=str(llama))))
    offline = Offline(OfflineSettings(base=str(llama)))
    offline.load("a", tmp_path)
    offline.bring("a")
    offline.submit([1, 2, 3], GREEDY, {"a": 1.0})
    with CountOperators() as counted:
        offline.engine.step()
    offline.run()
    assert offline.engine.stats().adapter_bytes_resident > 0
    assert operators_of_a_base_step(offline) == never
    assert set(counted.counts) - set(never)  # the products, under whatever name


@pytest.mark.parametrize(("kernels", "num_passes"), [("torch", 3), ("native", 5)])
def test_while_loading_the_model_is_run_a_few_times_only(
    llama: Path, kernels: KernelName, num_passes: int
) -> None:
    """Start-up is bounded by reading the weights: one forward on the model reads them once, however short it is.

    Two show which modules work token by token, one the shapes of keys and values, one who shares an input, one what
    each layer is given.
    """
    if kernels == "native":
        require_native_kernels()
    directory = find_base(str(llama))
    model = load_weights(directory, "llama", "bfloat16", CPU, "none")
    head, calls = model.get_output_embeddings().weight, []

    def note(module: torch.nn.Module, inputs: object) -> None:
        if getattr(module, "weight", None) is head:
            calls.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        base_of(
            model, CPU, name="llama", root="llama", directory=directory, max_model_len=64, kernels=kernels
        )
    finally:
        handle.remove()
    assert len(calls) == num_passes


def test_seconds_of_loading_are_told_by_stage(llama: Path) -> None:
    stages = Stages()
    load_base(str(llama), device="cpu", stages=stages)
    assert [part.rpartition(" ")[0] for part in str(stages).partition(": ")[2].split(", ")] == [
        "family",
        "weights",
        "linears and layers",
    ]
