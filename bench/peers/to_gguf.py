"""The benchmark's base and adapters as GGUF files for llama.cpp: bfloat16 weights, and the base in q8_0 as well.

    python -m bench.peers.to_gguf --models OUT    # OUT/gguf/base.gguf, base-q8_0.gguf, adapter-00.gguf, ...

Needs the package `gguf` (bench/peers/setup_llamacpp.sh installs it). Only shapes that bench/models.py makes of
Qwen3: llama.cpp's own converter knows every family, but refuses a tokenizer that it has not seen.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

_ARCHITECTURE = "qwen3"


def write_base(base: Path, out: Path, *, q8_0: bool = False) -> None:
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] != _ARCHITECTURE:
        raise ValueError(f"the base is {config['model_type']}; only {_ARCHITECTURE} is converted")
    writer = gguf.GGUFWriter(out, _ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    _add_tokenizer(writer, base, config)
    names = _names(config["num_hidden_layers"])
    for name, tensor in load_file(base / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        _add_tensor(writer, f"{names.get_name(stem)}.{kind}", tensor, q8_0)
    _write(writer)


def write_adapter(directory: Path, num_layers: int, out: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(out, _ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    names = _names(num_layers)
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        path, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        _add_tensor(writer, f"{names.get_name(path)}.weight.{matrix.lower()}", tensor)
    _write(writer)


def _names(num_layers: int) -> Any:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, num_layers)


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, q8_0: bool = False) -> None:
    if tensor.dim() == 1:  # llama.cpp wants norms in float32
        writer.add_tensor(name, tensor.float().numpy())
    elif q8_0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    else:
        as_bytes = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _add_tokenizer(writer: Any, base: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token_id in special] for _, token_id in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    template = base / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.to_gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, required=True, help="the --out of bench.models")
    models: Path = parser.parse_args(argv).models
    (models / "gguf").mkdir(exist_ok=True)
    write_base(models / "base", models / "gguf" / "base.gguf")
    write_base(models / "base", models / "gguf" / "base-q8_0.gguf", q8_0=True)
    num_layers = json.loads((models / "base" / "config.json").read_text())["num_hidden_layers"]
    for directory in sorted((models / "adapters").iterdir()):
        write_adapter(directory, num_layers, models / "gguf" / f"{directory.name}.gguf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
