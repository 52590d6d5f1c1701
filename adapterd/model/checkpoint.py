"""A checkpoint as it lies in a directory: its config, the context in which it is exact, its weights.

Refuses by name what cannot be read or would not be what the config says. Knows no seams and no adapters.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from adapterd.errors import BaseRefused
from adapterd.model.attention import ATTENTION_NAME

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["none", "int8", "bnb-8bit", "bnb-4bit"]

MIN_BITSANDBYTES = "0.48"
"""Before this a model in 8 bits cannot be moved: transformers refuses `model.to`."""

_FLOAT32_BELOW_PARAMETERS = 100_000_000
"""On a CPU a model this small gains nothing from 16 bits, and float32 is exact."""


def read_config(directory: Path, name: str) -> Any:
    """The config of a decoder that is stored in 16 or 32 bits; anything else is BaseRefused."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BaseRefused(f"base '{name}': config.json cannot be used: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise BaseRefused(
            f"base '{name}' is an encoder-decoder ({config.model_type}); only decoders are served"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BaseRefused(f"base '{name}' is a quantised checkpoint; give the 16-bit or 32-bit one")
    return config


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


def exact_context(config: Any, max_model_len: int | None) -> int:
    """The longest context that is exact, or the shorter one asked for.

    RoPE variants that change their frequencies with the longest position of the forward (longrope, dynamic)
    would do so for every sequence packed into it; below their switch they are plain, so that is their limit.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", 0) or 0)
    if limit <= 0:
        raise BaseRefused(f"base of type {config.model_type} does not say max_position_embeddings")
    rope = getattr(text, "rope_parameters", None) or {}
    reason = ""
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            switch = parameters.get("original_max_position_embeddings") or limit
            if int(switch) < limit:
                limit = int(switch)
                reason = (
                    f" ({parameters['rope_type']} RoPE switches its frequencies there, for a whole batch)"
                )
    if max_model_len is None:
        if reason:
            logger.warning("context limited to %d tokens%s", limit, reason)
        return limit
    if max_model_len > limit:
        raise BaseRefused(f"--max-model-len {max_model_len} exceeds the base's {limit} tokens{reason}")
    return max_model_len
