"""The proof at load sees a wrong scale, factor or order of experts; the whole proof sees everything."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterd.adapter import read_adapter
from adapterd.cli import main
from adapterd.core import AdapterDigest, BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, WEIGHTS_FILE
from adapterd.model.base import Base, load_base
from adapterd.peft_config import parse_peft_config
from adapterd.peft_deltas import Deltas, make_deltas
from adapterd.peft_proof import AdapterProver
from adapterd.peft_targets import find_targets
from tests.dialect.making import save_base, save_peft
from tests.offline import NO_TOKENIZER
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("proof") / "base"
    save_base("mixtral", directory)
    return load_base(str(directory), dtype="float32", device="cpu", kernels="torch")


@pytest.fixture(scope="module")
def written(mixture: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("proof") / "adapter"
    save_peft(
        mixture.directory,
        directory,
        seed=1,
        target_modules=["q_proj", "lm_head", "embed_tokens"],
        target_parameters=EXPERTS,
        use_rslora=True,
        alpha_pattern={"q_proj": 3},
    )
    return directory


def parts(base: Base, directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Deltas]:
    data = (directory / CONFIG_FILE).read_bytes()
    config = parse_peft_config(data, adapter="support")
    tensors = load_file(directory / WEIGHTS_FILE)
    targets = find_targets(config, base.spec, adapter="support")
    deltas = make_deltas(tensors, targets, config, base.spec, base.weights, adapter="support")
    return json.loads(data), tensors, deltas


def prove(spec: BaseSpec, config: dict[str, Any], tensors: dict[str, torch.Tensor], deltas: Deltas) -> Any:
    return AdapterProver(spec).prove(
        AdapterDigest("d"), config, tensors, deltas, has_effect=True, adapter="support"
    )


def test_verdict_is_exact_in_float32_and_within_bound_in_16_bits(mixture: Base, written: Path) -> None:
    config, tensors, deltas = parts(mixture, written)
    proof = prove(mixture.spec, config, tensors, deltas)
    assert (proof.verdict, proof.num_modules) == ("exact", len(deltas.sources))
    assert proof.num_modules == 3 + 2 + 6
    proof = prove(replace(mixture.spec, dtype="bfloat16"), config, tensors, deltas)
    assert proof.verdict == "within bound"
    assert 0 < proof.max_error < 0.05


def test_a_wrong_product_is_refused_and_named(mixture: Base, written: Path) -> None:
    config, tensors, deltas = parts(mixture, written)
    linear = deltas.modules[0]
    experts = next(edit for edit in deltas.edits if hasattr(edit, "parameter"))
    for wrong in (
        replace(deltas, modules=(replace(linear, scale=linear.scale * 1.01), *deltas.modules[1:])),
        replace(deltas, modules=(replace(linear, b=linear.b.flip(0)), *deltas.modules[1:])),
        replace(deltas, edits=(replace(experts, b=experts.b.flip(0)),)),
    ):
        with pytest.raises(AdapterRefused, match="differs from that of PEFT's own layer"):
            prove(mixture.spec, config, tensors, wrong)


def test_a_proof_is_made_once_for_a_digest_and_kept_with_the_adapter(mixture: Base, written: Path) -> None:
    prover = AdapterProver(mixture.spec)

    def read() -> Any:
        return read_adapter(
            written,
            name="support",
            spec=mixture.spec,
            tokenizer=NO_TOKENIZER,
            base_weights=mixture.weights,
            prover=prover,
        )

    assert read().proof is read().proof
    assert read().proof.has_effect


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}],
)
def test_no_effect_is_said(config: dict[str, Any], tmp_path: Path) -> None:
    """As PEFT begins: B is zero, and DoRA's magnitudes are the norms of the base's rows."""
    save_base("qwen2", tmp_path / "base")
    base = load_base(str(tmp_path / "base"), dtype="float32", device="cpu", kernels="torch")
    save_peft(base.directory, tmp_path / "adapter", seed=1, untrained=True, **config)
    adapter = read_adapter(
        tmp_path / "adapter",
        name="support",
        spec=base.spec,
        tokenizer=NO_TOKENIZER,
        base_weights=base.weights,
        prover=AdapterProver(base.spec),
    )
    assert not adapter.has_effect
    assert adapter.proof is not None
    assert not adapter.proof.has_effect


def test_prove_compares_whole_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "base")
    save_peft(
        tmp_path / "base",
        tmp_path / "adapters" / "all",
        seed=1,
        target_modules=["q_proj", "lm_head"],
        trainable_token_indices=[5, 6, 7],
        bias="all",
    )
    arguments = [
        "adapters",
        "prove",
        "--base",
        str(tmp_path / "base"),
        "--adapters",
        str(tmp_path / "adapters"),
    ]
    assert main([*arguments, "--json-out", str(tmp_path / "out.json")]) == 0
    assert "float32: exact" in capsys.readouterr().out
    (proof,) = json.loads((tmp_path / "out.json").read_text())
    assert proof["adapter"] == "all"
    assert proof["num_tokens_equal"] == proof["num_tokens"] > 0
    assert proof["max_error"] < 1e-3
    assert main([*arguments, "nobody"]) != 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_8_bits_is_compared_with_peft_over_its_rounded_weights(tmp_path: Path, dtype: str) -> None:
    """With a tied head, which has weights of its own once they are rounded, and magnitudes of the rounded rows."""
    base = tmp_path / "base"
    tiny_llama(base)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for name, is_dora in (("dora", True), ("lora", False)):
        targets = ["q_proj", "down_proj"]
        save_peft(base, tmp_path / "adapters" / name, seed=1, target_modules=targets, use_dora=is_dora)
    arguments = ["--base", str(base), "--adapters", str(tmp_path / "adapters"), "--device", "cpu"]
    quantized = [*arguments, "--dtype", dtype, "--quantization", "int8"]
    assert main(["adapters", "prove", *quantized, "--json-out", str(tmp_path / "out.json")]) == 0
    proofs = json.loads((tmp_path / "out.json").read_text())
    verdict = "exact" if dtype == "float32" else "within bound"
    assert [(proof["adapter"], proof["verdict"]) for proof in proofs] == [
        ("dora", verdict),
        ("lora", verdict),
    ]


def test_prove_refuses_what_is_not_peft_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "base")
    for name in ("bad", "good"):
        save_peft(tmp_path / "base", tmp_path / "adapters" / name, seed=1, target_modules=["q_proj"])
    weights = tmp_path / "adapters" / "bad" / WEIGHTS_FILE
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights)
    arguments = ["--base", str(tmp_path / "base"), "--adapters", str(tmp_path / "adapters")]
    assert main(["adapters", "prove", *arguments, "--json-out", str(tmp_path / "out.json")]) != 0
    assert "is missing" in capsys.readouterr().err
    bad, good = json.loads((tmp_path / "out.json").read_text())
    assert (bad["adapter"], "is missing" in bad["error"]) == ("bad", True)
    assert (good["adapter"], good["verdict"]) == ("good", "exact")
