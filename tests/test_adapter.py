"""PEFT itself writes the directories here, and PEFT's own loaded model says what each module's scale is."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.peft_targets import Layouts
from adapterd.render import Renderer
from adapterd.token_table import TokenizerIdentity
from tests.tiny import byte_level_tokenizer, spec_of, tiny_llama

# PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def spec(base: Path) -> BaseSpec:
    return spec_of(LlamaForCausalLM.from_pretrained(base))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> TokenizerIdentity:
    return Renderer.load(base).identity


def peft_directory(base: Path, directory: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter with random A and B, as PEFT's save_pretrained writes it."""
    model = LlamaForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | config
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft_model.save_pretrained(directory)
    return directory


@pytest.fixture
def written(base: Path, tmp_path: Path) -> Path:
    return peft_directory(base, tmp_path / "adapter")


@pytest.fixture
def read(spec: BaseSpec, tokenizer: TokenizerIdentity) -> Callable[..., Adapter]:
    def call(directory: Path, **arguments: Any) -> Adapter:
        return read_adapter(directory, name="support", **({"spec": spec, "tokenizer": tokenizer} | arguments))

    return call


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 16},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"},
    "one_layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {
        "target_modules": "all-linear",
        "exclude_modules": ["gate_proj", "model.layers.0.mlp.up_proj"],
    },
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32, r"layers.0.*": 5}, "rank_pattern": {"o_proj": 6}},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "fractional_alpha": {"lora_alpha": 0.5},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_matrices_and_scales_are_those_of_pefts_loaded_model(
    case: str, base: Path, tmp_path: Path, read: Callable[..., Adapter]
) -> None:
    directory = peft_directory(base, tmp_path / case, **PEFT_CONFIGS[case])
    adapter = read(directory)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)
    expected = {
        name.removeprefix("base_model.model."): module
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {matrices.module for matrices in adapter.modules} == set(expected)
    for matrices in adapter.modules:
        module = expected[matrices.module]
        assert matrices.scale == module.scaling["default"]
        assert torch.equal(matrices.a, module.lora_A["default"].weight)
        assert torch.equal(matrices.b, module.lora_B["default"].weight)
    assert adapter.max_rank == max(module.r["default"] for module in expected.values())
    assert adapter.num_bytes == sum(m.a.nbytes + m.b.nbytes for m in adapter.modules)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_type_is_kept(dtype: torch.dtype, written: Path, read: Callable[..., Adapter]) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(written / WEIGHTS_FILE).items()}
    save_file(tensors, written / WEIGHTS_FILE)
    adapter = read(written)
    for matrices in adapter.modules:
        assert torch.equal(matrices.a, tensors[f"base_model.model.{matrices.module}.lora_A.weight"])


def test_digest_is_of_content_not_of_place(
    written: Path, tmp_path: Path, base: Path, read: Callable[..., Adapter]
) -> None:
    copy = shutil.copytree(written, tmp_path / "elsewhere")
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps({**config, "lora_dropout": 0.5}, indent=9))
    assert read(copy).id == read(written).id
    other_weights = peft_directory(base, tmp_path / "other", seed=2)
    other_alpha = peft_directory(base, tmp_path / "alpha", lora_alpha=9)
    with_template = shutil.copytree(written, tmp_path / "template")
    (with_template / "chat_template.jinja").write_text("{{ messages }}")
    with_eos = shutil.copytree(written, tmp_path / "eos")
    (with_eos / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    with_defaults = shutil.copytree(written, tmp_path / "defaults")
    (with_defaults / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3}')
    every = [written, other_weights, other_alpha, with_template, with_eos, with_defaults]
    assert len({read(directory).id.digest for directory in every}) == len(every)


def test_files_that_peft_ignores_change_nothing(written: Path, read: Callable[..., Adapter]) -> None:
    before = read(written).id
    (written / "README.md").write_text("about")
    (written / "training_args.bin").write_bytes(b"\x80not ours")
    (written / "auto_map.py").write_text("raise SystemExit")
    assert read(written).id == before


def edited(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

TensorEdit = Callable[[dict[str, torch.Tensor]], Any]


def put(name: str, tensor: torch.Tensor) -> TensorEdit:
    return lambda tensors: tensors.update({name: tensor})


def drop(*names: str) -> TensorEdit:
    return lambda tensors: [tensors.pop(name) for name in names]


def fill(name: str, value: float) -> TensorEdit:
    return lambda tensors: tensors[name][0].fill_(value)


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
FAR = "base_model.model.model.layers.1000000000.self_attn.q_proj.lora_A.weight"
UP0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
SMALL = torch.ones(4, 32)

BAD_TENSORS: dict[str, tuple[TensorEdit, str]] = {
    "missing B": (drop(B0), r"q_proj\.lora_B\.weight' is missing"),
    "missing A": (drop(A0), r"q_proj\.lora_A\.weight' is missing"),
    "missing module": (drop(A0, B0), r"targets 'model\.layers\.0\.self_attn\.q_proj'"),
    "nothing": (dict.clear, "adapts no module"),
    "wrong input width": (put(A0, torch.ones(4, 31)), r"\[4, 31\].*\[4, 32\]"),
    "wrong rank": (put(A0, torch.ones(5, 32)), r"\[5, 32\].*rank 4"),
    "transposed": (put(B0, SMALL), r"\[4, 32\].*\[32, 4\]"),
    "flat": (put(B0, torch.ones(128)), r"\[128\]"),
    "nan": (fill(A0, float("nan")), "NaN or infinity"),
    "infinity": (fill(B0, float("-inf")), "NaN or infinity"),
    "huge": (fill(A0, 3e38), "beyond float32"),
    "dtype": (put(A0, SMALL.double()), "dtype F64"),
    "no such layer": (put(FAR, SMALL), r"no linear 'model\.layers\.1000000000.*nearest"),
    "no prefix": (put("model.layers.0.self_attn.q_proj.lora_A.weight", SMALL), "not named as PEFT"),
    "adapter name in key": (put(f"{Q0}.lora_A.default.weight", SMALL), "not named as PEFT"),
    "dora": (put(f"{Q0}.lora_magnitude_vector", torch.ones(32)), "DoRA"),
    "bias": (put(f"{Q0}.lora_B.bias", torch.ones(32)), "is a bias"),
    "embedding": (put("base_model.model.model.embed_tokens.lora_embedding_A", SMALL), "embedding"),
    "saved module": (put("base_model.model.lm_head.weight", SMALL), "modules_to_save"),
    "untargeted": (put(UP0, SMALL), "does not target"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case: str, written: Path, read: Callable[..., Adapter]) -> None:
    change, message = BAD_TENSORS[case]
    with_tensors(written, change)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        read(written)
    assert "'support'" in refusal.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank 2"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "does not target"),
        ({"target_modules": [*ATTENTION, "up_proj"]}, "no tensors for it"),
        ({"lora_alpha": 1e300}, "beyond float32"),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(
    changes: dict[str, Any], message: str, written: Path, read: Callable[..., Adapter]
) -> None:
    edited(written, **changes)
    with pytest.raises(AdapterRefused, match=message):
        read(written)


def test_values_beyond_the_compute_type_are_refused(
    written: Path, spec: BaseSpec, read: Callable[..., Adapter]
) -> None:
    with_tensors(written, lambda t: t[f"{Q0}.lora_A.weight"].fill_(1e5))
    assert read(written)
    half = BaseSpec(**{**spec.__dict__, "dtype": "float16"})
    with pytest.raises(AdapterRefused, match="beyond float16"):
        read(written, spec=half)


def test_strength_is_judged_module_by_module(
    written: Path, spec: BaseSpec, read: Callable[..., Adapter]
) -> None:
    """Large values in one module and a large scale in another do not meet."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(50.0 if name.startswith(Q0) else 1e-3)

    with_tensors(written, change)
    edited(written, alpha_pattern={"k_proj": 20_000})
    half = BaseSpec(**{**spec.__dict__, "dtype": "float16"})
    assert read(written, spec=half)
    edited(written, alpha_pattern={"q_proj": 20_000})
    with pytest.raises(
        AdapterRefused, match=r"'model\.layers\.0\.self_attn\.q_proj' reaches values beyond float16"
    ):
        read(written, spec=half)


def test_a_configuration_is_worked_out_once_and_refused_by_every_adapters_own_name(
    written: Path, spec: BaseSpec
) -> None:
    layouts = Layouts(spec)
    data = (written / "adapter_config.json").read_bytes()
    assert layouts.of(data, adapter="a") is layouts.of(data, adapter="b")
    edited(written, target_modules=["nowhere"], trainable_token_indices=[5])
    refused = (written / "adapter_config.json").read_bytes()
    for name in ("a", "b"):
        with pytest.raises(
            AdapterRefused, match=f"adapter '{name}': .*trainable_token_indices: this base's embedding"
        ):
            layouts.of(refused, adapter=name)


def test_other_base_is_refused(tmp_path: Path, written: Path, read: Callable[..., Adapter]) -> None:
    shallow = tiny_llama(tmp_path / "shallow", layers=1)
    with pytest.raises(AdapterRefused, match=r"no linear 'model\.layers\.1"):
        read(written, spec=spec_of(shallow))


def test_adapter_without_effect_is_loaded_and_said_so(
    written: Path, read: Callable[..., Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    with_tensors(written, lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name])
    assert read(written)
    assert "has no effect" in caplog.text


def test_every_missing_file_is_named(tmp_path: Path, written: Path, read: Callable[..., Adapter]) -> None:
    (written / WEIGHTS_FILE).rename(tmp_path / "weights")
    with pytest.raises(AdapterRefused, match=WEIGHTS_FILE):
        read(written)
    (written / CONFIG_FILE).unlink()
    with pytest.raises(AdapterRefused, match=CONFIG_FILE):
        read(written)
    with pytest.raises(AdapterRefused, match="cannot be resolved"):
        read(tmp_path / "nowhere")


class Canary:
    """Unpickling one of these makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


def test_pickle_is_refused_and_never_read(
    written: Path, tmp_path: Path, read: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Canary(), written / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin is a pickle"):
        read(written)
    (written / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin is a pickle"):
        read(written)
    assert not (tmp_path / "canary").exists()


def test_links_may_not_leave_the_root(written: Path, tmp_path: Path, read: Callable[..., Adapter]) -> None:
    outside = tmp_path / "outside.safetensors"
    (written / WEIGHTS_FILE).rename(outside)
    (written / WEIGHTS_FILE).symlink_to(outside)
    with pytest.raises(AdapterRefused, match="leads out of"):
        read(written)
    assert read(written, root=tmp_path)
    linked = tmp_path / "linked"
    linked.symlink_to(written, target_is_directory=True)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(AdapterRefused, match="leads out of"):
        read(linked, root=other)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(AdapterRefused, match="cannot be resolved"):
        read(loop)


def test_links_inside_the_root_are_followed_as_kubernetes_lays_them(
    written: Path, read: Callable[..., Adapter]
) -> None:
    version = written / "..2026_11_22"
    version.mkdir()
    (written / "..data").symlink_to(version.name)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (written / name).rename(version / name)
        (written / name).symlink_to(Path("..data") / name)
    assert read(written)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_fifo_and_directory_are_refused_without_waiting(
    name: str, written: Path, read: Callable[..., Adapter]
) -> None:
    (written / name).unlink()
    os.mkfifo(written / name)
    with pytest.raises(AdapterRefused, match="no regular file"):
        read(written)
    (written / name).unlink()
    (written / name).mkdir()
    with pytest.raises(AdapterRefused, match=r"no regular file|cannot be opened"):
        read(written)


def test_seal_with_other_hash_or_other_base_is_refused(written: Path, read: Callable[..., Adapter]) -> None:
    def seal(**changes: Any) -> None:
        files = {
            n: hashlib.sha256((written / n).read_bytes()).hexdigest() for n in (CONFIG_FILE, WEIGHTS_FILE)
        }
        content = {"files": files, "base_name": "tiny", "base_fingerprint": "aaaa", **changes}
        (written / SEAL_FILE).write_text(json.dumps(content))

    seal()
    assert read(written, base_fingerprint="aaaa")
    assert read(written)
    with pytest.raises(AdapterRefused, match=r"'tiny' with fingerprint aaaa, and 'tiny' has bbbb"):
        read(written, base_fingerprint="bbbb")
    edited(written, lora_alpha=9)
    with pytest.raises(AdapterRefused, match=rf"{CONFIG_FILE} has sha256"):
        read(written)
    seal(files=None)
    with pytest.raises(AdapterRefused, match="no 'files'"):
        read(written)


def test_an_adapter_of_a_4_bit_base_is_refused_on_another_unless_the_seal_no_longer_says_so(
    written: Path, read: Callable[..., Adapter], spec: BaseSpec
) -> None:
    files = {n: hashlib.sha256((written / n).read_bytes()).hexdigest() for n in (CONFIG_FILE, WEIGHTS_FILE)}
    (written / SEAL_FILE).write_text(json.dumps({"files": files, "trained_on": "bnb-4bit"}))
    with pytest.raises(
        AdapterRefused, match=r"held in bnb-4bit, and 'tiny' is held with --quantization none"
    ):
        read(written)
    assert read(written, spec=replace(spec, quantization="bnb-4bit"))
    for trained_on in ({}, {"trained_on": "bfloat16"}):
        (written / SEAL_FILE).write_text(json.dumps({"files": files, **trained_on}))
        assert read(written)
        assert read(written, spec=replace(spec, quantization="int8"))


def test_template_end_tokens_and_defaults_come_along(written: Path, read: Callable[..., Adapter]) -> None:
    byte_level_tokenizer(chat_template="Q: {{ messages[0]['content'] }}").save_pretrained(written)
    (written / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.2, "top_k": 7, "eos_token_id": [0]})
    )
    adapter = read(written)
    assert adapter.chat_template == "Q: {{ messages[0]['content'] }}"
    assert adapter.eos_token_ids == {0, 2}
    assert adapter.generation_defaults == {"temperature": 0.2, "top_k": 7}
