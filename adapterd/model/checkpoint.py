"""A checkpoint's weights as they lie in a directory, become a model (`base_config.py` reads its config).

Refuses by name what cannot be read or would not be what the config says. Knows no seams and no adapters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from adapterd.errors import BaseRefused
from adapterd.model.attention import ATTENTION_NAME

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8", "bnb-8bit", "bnb-4bit"]

MIN_BITSANDBYTES = "0.48"
"""Before this a model in 8 bits cannot be moved: transformers refuses `model.to`."""

_FLOAT32_BELOW_PARAMETERS = 100_000_000
"""On a CPU a model this small gains nothing from 16 bits, and float32 is exact."""


def load_weights(
    directory: Path,
    name: str,
    dtype: DtypeName,
    device: torch.device,
    quantization: QuantizationName,
    *,
    attention: str | None = ATTENTION_NAME,
) -> Any:
    """The model as its checkpoint says, or BaseRefused; still on the host but for bitsandbytes, which quantises
    where it computes. `attention`: transformers' name of the attention function, None for its own choice.
    """
    if not list(directory.glob("*.safetensors")):
        raise BaseRefused(f"base '{name}': no *.safetensors in its directory; other formats are not read")
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    bnb = {} if quantization in ("none", "int8") else _bitsandbytes(quantization, device, wanted)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=wanted,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **bnb,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseRefused(f"base '{name}' cannot be loaded: {error}") from error
    _check_complete(model, report, name)
    if dtype == "auto" and device.type == "cpu" and model.num_parameters() < _FLOAT32_BELOW_PARAMETERS:
        model = model.float()
    return model


def _bitsandbytes(
    quantization: QuantizationName, device: torch.device, dtype: torch.dtype | str
) -> dict[str, Any]:
    """What from_pretrained needs to load linears through bitsandbytes. Raises BaseRefused without CUDA or package."""
    if device.type != "cuda":
        raise BaseRefused(
            f"--quantization {quantization} needs a CUDA device; on {device} use --quantization int8"
        )
    if not is_bitsandbytes_available(MIN_BITSANDBYTES):
        raise BaseRefused(
            f"--quantization {quantization} needs the package bitsandbytes {MIN_BITSANDBYTES} or later:"
            " pip install 'adapterd[bnb]', or use --quantization int8"
        )
    compute = torch.bfloat16 if isinstance(dtype, str) else dtype
    if quantization == "bnb-8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    return {"quantization_config": config, "device_map": {"": device}}


def _check_complete(model: Any, report: Mapping[str, Any], name: str) -> None:
    """transformers fills what a checkpoint lacks with random numbers and drops what it does not expect."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise BaseRefused(f"base '{name}': its checkpoint lacks {len(missing)} tensors, {missing[0]} first")
    modules = {path for path, _ in model.named_modules()}
    # Parts that the decoder does not have (a vision tower) may stay out; a part of a module it has may not.
    dropped = sorted(key for key in report["unexpected_keys"] if key.rpartition(".")[0] in modules)
    if dropped:
        raise BaseRefused(
            f"base '{name}': its checkpoint holds {dropped[0]}, for which {type(model).__name__} has no place; "
            "its config.json asks for something else"
        )
