"""Other adapters than the usual one: their targets, kinds and types."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import LlamaForCausalLM

from adapterd.adapter import read_adapter
from adapterd.config import TrainSettings
from adapterd.errors import AdapterdError, InvalidRequest
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.render import Renderer
from adapterd.training.train import train
from tests.tiny import spec_of
from tests.training.runs import but

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_only_named_targets_are_adapted(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, target_modules=("q_proj", "layers.1.mlp.down_proj"), epochs=0.4))
    spec = spec_of(LlamaForCausalLM.from_pretrained(base))
    adapter = read_adapter(directory, name="support", spec=spec, tokenizer=Renderer.load(base).identity)
    assert [matrices.module for matrices in adapter.modules] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {matrices.scale for matrices in adapter.modules} == {2.0}


def test_unknown_target_is_refused_though_another_matches(told: TrainSettings) -> None:
    with pytest.raises(InvalidRequest, match=r"no linear 'c_attn' that takes adapters; it has .*q_proj"):
        train(but(told, target_modules=("q_proj", "c_attn")))


def test_rslora_is_folded_into_alpha(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, use_rslora=True, rank=16, alpha=8.0, epochs=0.4))
    config = json.loads((directory / CONFIG_FILE).read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (32.0, False)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)
    assert loaded.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 8 / 16**0.5


def test_dora_is_trained_and_served_as_it_was_trained(told: TrainSettings, base: Path) -> None:
    """The round trip in `train` compares what a fresh engine serves with what the trainer computed."""
    directory = train(but(told, use_dora=True, epochs=0.4))
    assert json.loads((directory / CONFIG_FILE).read_text())["use_dora"] is True
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        assert any(name.endswith("lora_magnitude_vector") for name in file.keys())  # noqa: SIM118
    assert json.loads((directory / SEAL_FILE).read_text())["round_trip"]["largest_difference"] < 1e-3
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)


def test_warm_start_goes_on_from_an_adapter(told: TrainSettings, caplog: pytest.LogCaptureFixture) -> None:
    first = train(told)
    ended = json.loads((first / SEAL_FILE).read_text())["validation_loss"]
    more = but(told, name="more", warm_start=first, rank=None)
    second = train(more)
    seal = json.loads((second / SEAL_FILE).read_text())
    assert seal["initial_validation_loss"] == pytest.approx(ended, abs=1e-5)
    assert json.loads((second / CONFIG_FILE).read_text())["r"] == 4
    train(but(more, learning_rate=1e-30))
    assert f"no step was better on the validation rows than the adapter in {first}" in caplog.text
    with pytest.raises(InvalidRequest, match=r"rank=8 cannot be changed with --warm-start: .* 4 stays"):
        train(but(more, rank=8))
    with pytest.raises(InvalidRequest, match="target_modules cannot be changed"):
        train(but(more, target_modules=("q_proj",)))


def test_a_start_that_is_more_than_a_and_b_is_refused_not_cut(
    told: TrainSettings, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(but(told, epochs=0.4))

    def go_on(kind: str, files: dict[str, str | bytes]) -> Path:
        start = shutil.copytree(first, tmp_path / kind)
        (start / SEAL_FILE).unlink()
        for name, content in files.items():
            (start / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return train(but(told, name="more", warm_start=start, rank=None, epochs=0.4))

    with pytest.raises(InvalidRequest, match=r"template: it brings a chat template other than the base's"):
        go_on("template", {"chat_template.jinja": "{{ messages }}"})
    with pytest.raises(InvalidRequest, match=r"it ends on tokens \[0, 2\], and rows .* does, on \[2\]"):
        go_on("end", {"tokenizer_config.json": '{"eos_token": "<|endoftext|>"}'})
    config = json.loads((first / CONFIG_FILE).read_text()) | {"lora_bias": True}
    matrices = load_file(first / WEIGHTS_FILE)
    biases = {
        name.replace(".weight", ".bias"): torch.ones(len(tensor))
        for name, tensor in matrices.items()
        if ".lora_B." in name
    }
    with pytest.raises(InvalidRequest, match=r"more than its linears' A and B \(lora_bias\)"):
        go_on("bias", {CONFIG_FILE: json.dumps(config), WEIGHTS_FILE: save(matrices | biases)})

    template = Renderer.load(base).chat_template
    assert template is not None
    sampling = '{"do_sample": true, "temperature": 0.6}'
    go_on("alike", {"chat_template.jinja": template, "generation_config.json": sampling})
    assert "its generation defaults (temperature) are not carried over" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "bnb-4bit"}, "--quantization bnb-4bit needs a CUDA device"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"warm_start": Path("nowhere")}, "nowhere cannot be resolved"),
        ({"base": "nowhere"}, "no such directory"),
    ],
)
def test_what_cannot_be_had_here_is_refused_by_name(
    changes: dict[str, object], message: str, told: TrainSettings
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(AdapterdError, match=message):
        train(but(told, **changes))
    assert told.out is not None
    assert not told.out.exists()


def test_bfloat16_keeps_a_and_b_in_float32(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, dtype="bfloat16", epochs=1.0))
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert json.loads((directory / SEAL_FILE).read_text())["round_trip"]["mean_difference"] < 0.05
