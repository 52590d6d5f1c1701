"""Load and freeze the base model, attach the seams, refuse by name what cannot be served exactly."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from adapterd.core import BaseModules, BaseSpec
from adapterd.errors import AdapterRefused, BaseRefused
from adapterd.model.attention import ATTENTION_NAME, ContextFactory, register_attention
from adapterd.model.find import find_base
from adapterd.model.int8 import quantize_linears
from adapterd.model.kernels import TORCH_KERNELS, KernelName, choose_kernels
from adapterd.model.kv import KVShape
from adapterd.model.lora import LoraLinear, LoraStep
from adapterd.model.probe import probe_family
from adapterd.model.seams import attach_seams
from adapterd.model.threads import use_all_cores

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
QuantizationName = Literal["none", "int8", "bnb-8bit", "bnb-4bit"]

_FLOAT32_BELOW_PARAMETERS = 100_000_000
"""On a CPU a model this small gains nothing from 16 bits, and float32 is exact."""


@dataclass(frozen=True)
class Base:
    """The frozen model with its seams, and what was learnt of it while loading."""

    model: torch.nn.Module
    spec: BaseSpec
    directory: Path
    device: torch.device
    dtype: torch.dtype
    kv_shapes: Mapping[int, KVShape]
    lora_step: LoraStep
    paged_context: ContextFactory

    def weights(self, name: str) -> torch.Tensor:
        """A tensor by its name in `spec.modules.parameters`; the base's own, not to be changed."""
        path, _, tensor = name.rpartition(".")
        module = self.model.get_submodule(path)
        found = getattr(module.inner if isinstance(module, LoraLinear) else module, tensor)
        assert isinstance(found, torch.Tensor)
        if not found.is_floating_point():
            raise AdapterRefused(
                f"{name!r} of this base is held in {found.dtype}, so what an adapter says about it cannot be read;"
                " serve the base with --quantization int8 or none"
            )
        return found


def load_base(
    name_or_dir: str,
    *,
    served_name: str | None = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    max_model_len: int | None = None,
    kernels: KernelName = "auto",
    quantization: QuantizationName = "none",
) -> Base:
    """Load `mini` (the embedded base), a local directory or a Hugging Face Hub id.

    kernels: whether the C++ operators are used; `auto` means where they apply and are built.
    quantization: int8 rounds the linears' weights at load (see int8.py), bnb-* leaves that to bitsandbytes.
    Raises BaseRefused when the files are missing or the family cannot be served exactly.
    """
    register_attention()
    transformers.utils.logging.disable_progress_bar()  # the daemon's log is for lines
    directory = find_base(name_or_dir)
    config = read_config(directory, name_or_dir)
    context = exact_context(config, max_model_len)
    where = choose_device(device)
    on_cpu = where.type == "cpu"
    if on_cpu:
        use_all_cores()
    # The probe is small and in float32, whatever the model will be.
    probe_kernels = choose_kernels(kernels, where, torch.float32) if on_cpu else TORCH_KERNELS
    probed = probe_family(config, max_position=context - 1, kernels=probe_kernels)
    return base_of(
        load_weights(directory, name_or_dir, dtype, where, quantization),
        where,
        name=served_name or _default_name(name_or_dir),
        root=name_or_dir,
        directory=directory,
        max_model_len=context,
        kernels=kernels,
        quantization=quantization,
        takes_edits=probed.takes_edits,
    )


def base_of(
    model: Any,
    device: torch.device,
    *,
    name: str,
    root: str,
    directory: Path,
    max_model_len: int,
    kernels: KernelName = "auto",
    quantization: QuantizationName = "none",
    takes_edits: bool = True,
) -> Base:
    """Freeze a model, bring it to the device and attach the seams, in place; its attention must be ATTENTION_NAME's.

    quantization: int8 is done here, bnb-* must have been done. takes_edits: what the family's probe said.
    """
    model.requires_grad_(False).eval()
    num_parameters = model.num_parameters()
    if quantization == "int8":
        quantize_linears(model)
    model.to(device)

    chosen = choose_kernels(kernels, device, model.dtype)
    seams = attach_seams(model, chosen)
    family = model.config.model_type
    spec = BaseSpec(
        name=name,
        root=root,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=int(model.config.get_text_config().vocab_size),
        max_model_len=max_model_len,
        lora_targets=seams.targets,
        eos_token_ids=_eos_token_ids(model),
        modules=seams.modules if takes_edits else _without_edits(seams.modules, family),
        quantization=quantization,
    )
    logger.info(
        "base %s: %s, %s%s on %s, %.1f M parameters, context %d",
        spec.name,
        spec.architecture,
        spec.dtype,
        "" if quantization == "none" else f" with {quantization} linears",
        device,
        num_parameters / 1e6,
        max_model_len,
    )
    return Base(
        model, spec, directory, device, model.dtype, seams.kv_shapes, seams.lora_step, chosen.paged_context
    )


def _without_edits(modules: BaseModules, family: str) -> BaseModules:
    logger.warning(
        "the %s family gives other logits when its embedding, head or norms are edited for some tokens of a batch:"
        " adapters that change them are refused",
        family,
    )
    return BaseModules(parameters=modules.parameters, is_tied=modules.is_tied)


def _default_name(name_or_dir: str) -> str:
    return name_or_dir if not Path(name_or_dir).expanduser().is_dir() else Path(name_or_dir).resolve().name


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
    if find_spec("bitsandbytes") is None:
        raise BaseRefused(
            f"--quantization {quantization} needs the package bitsandbytes: pip install 'adapterd[bnb]',"
            " or use --quantization int8"
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


def choose_device(device: DeviceName) -> torch.device:
    """What `--device` means on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BaseRefused("--device cuda, but this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


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


def _eos_token_ids(model: Any) -> frozenset[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
