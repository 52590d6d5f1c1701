"""What cannot be exact is refused by name, also where PEFT itself made the directory and would load it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterd.adapter import Adapter, read_adapter
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, WEIGHTS_FILE
from adapterd.model.base import Base, load_base
from tests.dialect.making import save_base, save_peft
from tests.offline import NO_TOKENIZER

# PEFT's: of tied weights, of saved embeddings, of patterns that it then applies all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)


@pytest.fixture(scope="module", params=["qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("refused") / "base"
    save_base(request.param, directory)
    return load_base(str(directory), dtype="float32", device="cpu", kernels="torch")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("refused") / "tied"
    save_base("qwen2-tied", directory)
    return load_base(str(directory), dtype="float32", device="cpu", kernels="torch")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("refused") / "mixture"
    save_base("mixtral", directory)
    return load_base(str(directory), dtype="float32", device="cpu", kernels="torch")


def read(base: Base, directory: Path, **arguments: Any) -> Adapter:
    return read_adapter(
        directory,
        name="support",
        spec=base.spec,
        tokenizer=NO_TOKENIZER,
        **({"base_weights": base.weights} | arguments),
    )


def edited(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


MADE_BY_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "path_initial_model"),
    "olora": ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "path_initial_model"),
    "layers twice": ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]}, "repeated layers"),
    "activated": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [5]}, "activated LoRA"),
    "a whole layer": ({"target_modules": ["lm_head"], "modules_to_save": ["layers.1"]}, "holds"),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_what_peft_made_and_cannot_be_exact_is_refused(case: str, base: Base, tmp_path: Path) -> None:
    config, message = MADE_BY_PEFT[case]
    save_peft(base.directory, tmp_path, seed=1, **config)
    if case == "a whole layer":
        assert read(base, tmp_path)  # a layer is linears and norms: each of them is replaced
    else:
        with pytest.raises(AdapterRefused, match=message):
            read(base, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converted_is_plain_lora(init: str, base: Base, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(
            model,
            LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM"),
        )
        config = peft_model.peft_config["default"]
        config.init_lora_weights = True
        peft_model.save_pretrained(tmp_path / "initial")
        config.init_lora_weights = init
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        peft_model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    adapter = read(base, tmp_path / "converted")
    assert adapter.max_rank == 8
    weight = base.weights("model.layers.0.self_attn.q_proj.weight")
    trained = peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = trained.base_layer.weight + trained.get_delta_weight("default")
    matrices = next(m for m in adapter.modules if m.module == "model.layers.0.self_attn.q_proj")
    assert torch.allclose(weight + matrices.scale * matrices.b @ matrices.a, expected, atol=1e-5)


CONFIG_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens beyond the vocabulary": ({"trainable_token_indices": [3, 160]}, "160 is none of them"),
    "tokens of a linear": ({"trainable_token_indices": {"q_proj": [3]}}, "neither the embedding nor the head"),
    "saved module that is not there": ({"modules_to_save": ["score"]}, "no module 'score'"),
    "parameter that is not there": ({"target_parameters": ["experts.up"]}, "no parameter 'experts.up'"),
    "parameter of the embedding": ({"target_parameters": ["embed_tokens.weight"]}, "takes no factors"),
    "parameter of a target": ({"target_parameters": ["q_proj.weight"]}, "also among target_modules"),
    "bias that the file lacks": ({"bias": "all"}, "bias' is missing"),
    "copy that the file lacks": ({"modules_to_save": ["lm_head"]}, "lm_head.weight' is missing"),
    "magnitude that the file lacks": ({"use_dora": True}, "lora_magnitude_vector' is missing"),
    "rows that the file lacks": ({"trainable_token_indices": [3]}, "trainable_tokens_delta' is missing"),
    "embedding that the file lacks": ({"target_modules": ["q_proj", "embed_tokens"]}, "no tensors for it"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_a_config_that_asks_for_more_is_refused(case: str, base: Base, tmp_path: Path) -> None:
    changes, message = CONFIG_EDITS[case]
    save_peft(base.directory, tmp_path, seed=1, target_modules=["q_proj"])
    edited(tmp_path, **changes)
    with pytest.raises(AdapterRefused, match=message):
        read(base, tmp_path)


def test_another_embedding_beside_its_adapter_is_refused(base: Base, tmp_path: Path) -> None:
    save_peft(base.directory, tmp_path, seed=1, target_modules=["q_proj", "embed_tokens"])
    plain = read(base, tmp_path).id
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    with_tensors(tmp_path, lambda tensors: tensors[name].mul_(1.5))
    with pytest.raises(AdapterRefused, match="another weight than the base's"):
        read(base, tmp_path)
    # What says only what the base says is no part of the adapter.
    with_tensors(tmp_path, lambda tensors: tensors.pop(name))
    assert read(base, tmp_path).id == plain


def test_ties_that_are_broken_in_the_file_are_refused(tied: Base, tmp_path: Path) -> None:
    save_peft(tied.directory, tmp_path, seed=1, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with_tensors(tmp_path, lambda tensors: tensors["base_model.model.lm_head.lora_A.weight"].mul_(2))
    with pytest.raises(AdapterRefused, match="is not the embedding's"):
        read(tied, tmp_path)


def test_copies_of_experts_are_refused(mixture: Base, tmp_path: Path) -> None:
    save_peft(mixture.directory, tmp_path, seed=1, target_modules=["q_proj"], modules_to_save=["mlp.experts"])
    with pytest.raises(AdapterRefused, match="cannot run for some tokens"):
        read(mixture, tmp_path)


def test_without_the_bases_weights_what_needs_them_is_refused(base: Base, tmp_path: Path) -> None:
    save_peft(base.directory, tmp_path, seed=1, target_modules=["q_proj"], use_dora=True)
    assert read(base, tmp_path)
    with pytest.raises(AdapterRefused, match="beside the base's weights"):
        read(base, tmp_path, base_weights=None)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
)
def test_the_digest_covers_every_tensor(config: dict[str, Any], base: Base, tmp_path: Path) -> None:
    save_peft(base.directory, tmp_path, seed=1, **config)
    digests = {read(base, tmp_path).id.digest}
    names = [name for name in load_file(tmp_path / WEIGHTS_FILE) if ".base_layer.weight" not in name]
    for name in names:
        with_tensors(tmp_path, lambda tensors, name=name: tensors[name].view(-1)[0].add_(0.25))  # type: ignore[misc]
        digests.add(read(base, tmp_path).id.digest)
    assert len(digests) == len(names) + 1


def test_the_digest_covers_the_scale_of_factors_that_are_merged(tmp_path: Path) -> None:
    """Regression: a router's factors count by the file's tensors, and the scale they are merged at was in no place."""
    save_base("qwen3-moe", tmp_path / "base")
    base = load_base(str(tmp_path / "base"), dtype="float32", device="cpu", kernels="torch")
    directory = tmp_path / "adapter"
    save_peft(base.directory, directory, seed=1, target_modules=[], target_parameters=["mlp.gate.weight"])
    digests = {read(base, directory).id.digest}
    for change in ({"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"gate.weight": 3}}):
        edited(directory, **change)
        digests.add(read(base, directory).id.digest)
    assert len(digests) == 4
