"""Attach to a transformers model what serving needs: faster modules that compute the same, and places for adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapterd.core import BaseModules
from adapterd.model.attention import AttentionContext, ContextFactory, ShapeRecorder, TrialContext
from adapterd.model.int8 import Int8Linear
from adapterd.model.kernels import Kernels
from adapterd.model.kv import KVShape
from adapterd.model.linear_cpu import use_fastest_linears
from adapterd.model.lora import LoraStep, wrap_linears
from adapterd.model.mlps import use_fused_mlps
from adapterd.model.modules import find_modules
from adapterd.model.norms import use_fused_norms


@dataclass(frozen=True)
class Seams:
    """targets: path -> (d_out, d_in) of every linear that adapters may change; modules: what else they may change;
    kv_shapes: by layer.
    """

    lora_step: LoraStep
    targets: Mapping[str, tuple[int, int]]
    modules: BaseModules
    kv_shapes: Mapping[int, KVShape]


def attach_seams(model: Any, kernels: Kernels) -> Seams:
    """Change the model in place. Its attention must be ATTENTION_NAME's; parameters stay what they are."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.product = kernels.int8_product
    recorder = ShapeRecorder()
    # Triton's, which tests run on a CPU, put plain linears together.
    if device.type == "cpu" and (kernels.is_native or kernels.fuse is None):
        use_fastest_linears(model, kernels.is_native)  # first, so that the forwards below are fast ones
    modules = find_modules(model, lambda num_tokens: _tokens(model, device, ShapeRecorder(), num_tokens))
    if kernels.rms_norm is not None:
        use_fused_norms(model, kernels.rms_norm)
    if kernels.silu_mul is not None:
        use_fused_mlps(model, kernels.silu_mul)
    step = kernels.lora_step()
    head = model.get_output_embeddings()
    targets = wrap_linears(model, step, lambda path: model.get_submodule(path) is not head)
    _tokens(model, device, recorder, 1)
    if kernels.fuse is not None:
        kernels.fuse(model, step, recorder.shapes, lambda: _tokens(model, device, ShapeRecorder(), 2))
    return Seams(step, targets, modules, recorder.shapes)


def attend_once(model: Any, make_context: ContextFactory) -> None:
    """One forward of a few tokens in which every layer attends by contexts so made: what cannot run there raises."""
    _tokens(model, next(model.parameters()).device, TrialContext(make_context), 3)


@torch.inference_mode()
def _tokens(model: Any, device: torch.device, context: AttentionContext, num_tokens: int) -> None:
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    positions = torch.arange(num_tokens, device=device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, paged=context)
