import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from adapterd.adapter import read_adapter
from adapterd.adapter_writer import base_fingerprint, write_adapter
from adapterd.core import BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.token_table import TokenizerIdentity
from tests.tiny import spec_of, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NO_TOKENIZER = TokenizerIdentity(frozenset(), {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def spec(base: Path) -> BaseSpec:
    return spec_of(LlamaForCausalLM.from_pretrained(base))


def matrices(spec: BaseSpec, *, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator))
        for module, (d_out, d_in) in spec.lora_targets.items()
        if module.endswith(("q_proj", "down_proj"))
    }


def write(
    directory: Path, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]], **arguments: object
) -> None:
    settings = {"base_fingerprint": "ffff", "dtype": torch.float32} | arguments
    write_adapter(
        directory,
        tensors,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        base_name="tiny",
        **settings,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_directory_is_what_peft_and_the_reader_load(
    dtype: torch.dtype, base: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    tensors = matrices(spec)
    write(tmp_path / "support", tensors, dtype=dtype)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "support")
    ours = read_adapter(tmp_path / "support", name="support", spec=spec, tokenizer=NO_TOKENIZER)
    assert {m.module for m in ours.modules} == set(tensors)
    for m in ours.modules:
        theirs = loaded.base_model.model.get_submodule(m.module)
        assert m.scale == theirs.scaling["default"] == 2.0
        assert m.a.dtype == dtype
        assert torch.equal(m.a.float(), theirs.lora_A["default"].weight)
        assert torch.equal(m.b, tensors[m.module][1].to(dtype))


def test_same_tensors_make_the_same_bytes(spec: BaseSpec, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, matrices(spec))
    for name in (CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_existing_directory_keeps_its_other_files(spec: BaseSpec, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("r = 4")
    write(tmp_path, matrices(spec), extra_files={"training.csv": "step\n"}, notes={"seed": 3})
    write(tmp_path, matrices(spec, seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE, "recipe.toml", "training.csv"]
    )
    adapter = read_adapter(tmp_path, name="support", spec=spec, tokenizer=NO_TOKENIZER)
    assert torch.equal(adapter.modules[0].a, matrices(spec, seed=1)[adapter.modules[0].module][0])


def test_two_versions_mixed_are_refused(spec: BaseSpec, tmp_path: Path) -> None:
    write(tmp_path / "old", matrices(spec))
    write(tmp_path / "new", matrices(spec, seed=1))
    (tmp_path / "new" / WEIGHTS_FILE).rename(tmp_path / "old" / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="damaged or of two versions"):
        read_adapter(tmp_path / "old", name="support", spec=spec, tokenizer=NO_TOKENIZER)


def test_flipped_bit_is_refused(spec: BaseSpec, tmp_path: Path) -> None:
    write(tmp_path / "a", matrices(spec))
    path = tmp_path / "a" / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterRefused, match="has sha256"):
        read_adapter(tmp_path / "a", name="support", spec=spec, tokenizer=NO_TOKENIZER)


def test_values_that_the_stored_type_cannot_hold_write_nothing(spec: BaseSpec, tmp_path: Path) -> None:
    tensors = matrices(spec)
    next(iter(tensors.values()))[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="was not written"):
        write(tmp_path / "a", tensors)
    assert list(tmp_path.iterdir()) == []


def test_seal_names_the_base(spec: BaseSpec, tmp_path: Path) -> None:
    write(tmp_path / "a", matrices(spec), notes={"seed": 3})
    seal = json.loads((tmp_path / "a" / SEAL_FILE).read_text())
    assert (seal["base_name"], seal["base_fingerprint"], seal["seed"]) == ("tiny", "ffff", 3)


def test_fingerprint_tells_bases_apart(base: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "same")
    tiny_llama(tmp_path / "other", seed=1)
    assert base_fingerprint(tmp_path / "same") == base_fingerprint(base)
    assert base_fingerprint(tmp_path / "other") != base_fingerprint(base)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    (tmp_path / "same" / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert base_fingerprint(tmp_path / "same") != base_fingerprint(base)
