"""Linears of one input, with their adapters, in one C++ call: q, k and v together, gate and up together."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from adapterd.model.grouped import LinearGroup, shared_inputs, use_group
from adapterd.model.linear_cpu import AnyCpuLinear, native_linear
from adapterd.model.lora import LoraLinear
from adapterd.model.lora_cpu import NativeLoraStep


class NativeGroup(LinearGroup):
    def __init__(self, linears: Mapping[str, AnyCpuLinear], step: NativeLoraStep) -> None:
        super().__init__(tuple(linears), step)
        self._linears = tuple(linears.values())
        self._weights = [linear.matrix for linear in self._linears]
        self._scales = [linear.scales for linear in self._linears]
        self._biases = [linear.bias for linear in self._linears]
        self._choice = self._linears[0].choice
        self._native_step = step
        self._place = step.register(self.paths)
        self._compute: Callable[..., list[torch.Tensor]] = torch.ops.adapterd.linears.default

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        num_tokens = x.numel() // x.shape[-1]
        step = self._native_step
        table: torch.Tensor | None = None
        bounds: list[int] = []
        if step.segments:
            if num_tokens != step.num_tokens:
                raise RuntimeError(f"{self.paths[0]} saw {num_tokens} of {step.num_tokens} tokens")
            table, bounds = step.additions(self._place)
        way = self._choice.way(num_tokens)
        if way is native_linear:
            return self._compute(x.contiguous(), self._weights, self._scales, self._biases, table, bounds)
        found = [way(x, w, b, s) for w, b, s in zip(self._weights, self._biases, self._scales, strict=True)]
        if table is not None:
            rows = x.reshape(-1, x.shape[-1])
            for path, y in zip(self.paths, found, strict=True):
                step.add(path, y.view(-1, y.shape[-1]), rows)
        return found


def group_linears(model: nn.Module, step: NativeLoraStep, run: Callable[[], object]) -> int:
    """Replace the model's wrapped CPU linears by grouped ones; returns how many groups have several members.

    `run` is one forward of the model. A linear that it does not reach is a group of its own.
    """
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    inners = {path: m.inner for path, m in wrapped.items() if isinstance(m.inner, AnyCpuLinear)}
    groups = shared_inputs({path: wrapped[path] for path in inners}, run)
    reached = {path for paths in groups for path in paths}
    groups += [[path] for path in inners if path not in reached]
    for paths in groups:
        use_group(model, wrapped, NativeGroup({path: inners[path] for path in paths}, step))
    return sum(len(paths) > 1 for paths in groups)
