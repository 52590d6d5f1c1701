"""The base: a checkpoint's model, frozen, with the seams attached. Refuses by name what cannot be served exactly."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from adapterd.adapter import Adapter
from adapterd.core import BaseModules, BaseSpec
from adapterd.errors import AdapterRefused, BaseRefused
from adapterd.host_memory import give_back_freed
from adapterd.model.attention import ContextFactory, register_attention
from adapterd.model.base_config import exact_context, read_config
from adapterd.model.checkpoint import DtypeName, QuantizationName, load_weights
from adapterd.model.find import find_base
from adapterd.model.host_layout import lay_out
from adapterd.model.huge_pages import use_huge_pages
from adapterd.model.int8 import quantize_linears
from adapterd.model.kernels import TORCH_KERNELS, KernelName, choose_kernels
from adapterd.model.kv import KVShape
from adapterd.model.lora import LoraLinear, LoraStep
from adapterd.model.probe import probe_family
from adapterd.model.seams import Seams, attach_seams, attend_once
from adapterd.model.threads import use_all_cores
from adapterd.stages import Stages

logger = logging.getLogger(__name__)

DeviceName = Literal["auto", "cpu", "cuda"]


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

    def lay_out(self, adapter: Adapter) -> Adapter:
        """The same adapter as it is to wait in host memory for this device."""
        return lay_out(adapter, self.dtype) if self.device.type == "cuda" else adapter

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
    stages: Stages | None = None,
) -> Base:
    """Load `mini` (the embedded base), a local directory or a Hugging Face Hub id.

    kernels: whether the C++ operators are used; `auto` means where they apply and are built.
    quantization: int8 rounds the linears' weights at load (see int8.py), bnb-* leaves that to bitsandbytes.
    stages: told where the seconds go.
    Raises BaseRefused when the files are missing or the family cannot be served exactly.
    """
    stages = stages or Stages()
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
    stages.done("family")
    model = load_weights(directory, name_or_dir, dtype, where, quantization)
    stages.done("weights")
    base = base_of(
        model,
        where,
        name=served_name or _default_name(name_or_dir),
        root=name_or_dir,
        directory=directory,
        max_model_len=context,
        kernels=kernels,
        quantization=quantization,
        takes_edits=probed.takes_edits,
    )
    stages.done("linears and layers")
    return base


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
    if device.type == "cpu":
        use_huge_pages(model)
        give_back_freed()

    chosen = choose_kernels(kernels, device, model.dtype, partial(attend_once, model))
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
        modules=seams.modules if takes_edits else _without_edits(seams, family),
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


def _without_edits(seams: Seams, family: str) -> BaseModules:
    """What is left: linears, whose outputs may be changed for some tokens as LoRA changes them."""
    modules = seams.modules
    logger.warning(
        "the %s family gives other logits when its embedding, head or norms are edited for some tokens of a batch:"
        " adapters that change them are refused",
        family,
    )
    return BaseModules(
        parameters=modules.parameters,
        input_axes={path: axis for path, axis in modules.input_axes.items() if path in seams.targets},
        is_tied=modules.is_tied,
        transposed=modules.transposed,
    )


def _default_name(name_or_dir: str) -> str:
    return name_or_dir if not Path(name_or_dir).expanduser().is_dir() else Path(name_or_dir).resolve().name


def choose_device(device: DeviceName) -> torch.device:
    """What `--device` means on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BaseRefused("--device cuda, but this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _eos_token_ids(model: Any) -> frozenset[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
