"""Linears of one input, with their adapters, in one C++ call: q, k and v together, gate and up together.

Which linears those are is seen, not guessed: in one forward of the model, neighbours below one parent that are handed
the very same tensor. The first of a group to be asked computes all; the others find their answer waiting. A group
checks that this holds in every step, or raises.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from adapterd.model.linear_cpu import AnyCpuLinear, native_linear
from adapterd.model.lora import LoraLinear
from adapterd.model.lora_cpu import NativeLoraStep


class LinearGroup:
    """Linears that read one input. `take` gives each its answer, once a step."""

    def __init__(self, linears: Mapping[str, AnyCpuLinear], step: NativeLoraStep) -> None:
        self._paths = tuple(linears)
        self._linears = tuple(linears.values())
        self._weights = [linear.matrix for linear in self._linears]
        self._scales = [linear.scales for linear in self._linears]
        self._biases = [linear.bias for linear in self._linears]
        self._choice = self._linears[0].choice
        self._step = step
        self._place = step.register(self._paths)
        self._compute: Callable[..., list[torch.Tensor]] = torch.ops.adapterd.linears.default
        self._input: torch.Tensor | None = None
        self._waiting: list[torch.Tensor | None] = []
        self._num_waiting = 0

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The member's product of x, its adapters' included. Raises RuntimeError if the members' inputs differ."""
        if self._input is None:
            found = self._all(x)
            if len(found) == 1:
                return found[0]
            self._input, self._waiting, self._num_waiting = x, list(found), len(found)
        elif self._input is not x:
            raise RuntimeError(f"{self._paths[member]} is asked with another input than {self._paths[0]} was")
        answer = self._waiting[member]
        if answer is None:
            raise RuntimeError(f"{self._paths[member]} is asked twice in one step")
        self._waiting[member] = None
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self._input = None
        return answer

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        num_tokens = x.numel() // x.shape[-1]
        table: torch.Tensor | None = None
        bounds: list[int] = []
        if self._step.segments:
            if num_tokens != self._step.num_tokens:
                raise RuntimeError(f"{self._paths[0]} saw {num_tokens} of {self._step.num_tokens} tokens")
            table, bounds = self._step.additions(self._place)
        way = self._choice.way(num_tokens)
        if way is native_linear:
            return self._compute(x.contiguous(), self._weights, self._scales, self._biases, table, bounds)
        found = [way(x, w, b, s) for w, b, s in zip(self._weights, self._biases, self._scales, strict=True)]
        if table is not None:
            rows = x.reshape(-1, x.shape[-1])
            for path, y in zip(self._paths, found, strict=True):
                self._step.add(path, y.view(-1, y.shape[-1]), rows)
        return found


class GroupedLinear(LoraLinear):
    """LoraLinear whose product is its group's."""

    def __init__(self, single: LoraLinear, group: LinearGroup, member: int) -> None:
        super().__init__(single.inner, single.path, single.step)
        self._take = group.take
        self._member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._take(self._member, x)


@dataclass(frozen=True)
class _Call:
    path: str
    input: torch.Tensor


def group_linears(model: nn.Module, step: NativeLoraStep, run: Callable[[], object]) -> int:
    """Replace the model's wrapped CPU linears by grouped ones; returns how many groups have several members.

    `run` is one forward of the model, in which is seen who shares an input. A linear that it does not reach (an
    expert that no token chose) is a group of its own.
    """
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    wrapped = {path: m for path, m in wrapped.items() if isinstance(m.inner, AnyCpuLinear)}
    calls: list[_Call] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: calls.append(_Call(path, inputs[0])))
        for path, module in wrapped.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups = [*_shared_inputs(calls)]
    reached = {path for paths in groups for path in paths}
    groups += [[path] for path in wrapped if path not in reached]
    for paths in groups:
        inners = {path: wrapped[path].inner for path in paths}
        group = LinearGroup({path: m for path, m in inners.items() if isinstance(m, AnyCpuLinear)}, step)
        for member, path in enumerate(paths):
            model.set_submodule(path, GroupedLinear(wrapped[path], group, member))
    return sum(len(paths) > 1 for paths in groups)


def _shared_inputs(calls: Iterable[_Call]) -> list[list[str]]:
    """Neighbours in order of call with one parent and one input. A linear called twice ends up in groups of its own."""
    groups: list[list[_Call]] = []
    for call in calls:
        last = groups[-1][-1] if groups else None
        if last and last.input is call.input and _parent(last.path) == _parent(call.path):
            groups[-1].append(call)
        else:
            groups.append([call])
    counts: dict[str, int] = {}
    for group in groups:
        for call in group:
            counts[call.path] = counts.get(call.path, 0) + 1
    once = [[call.path for call in group if counts[call.path] == 1] for group in groups]
    return [paths for paths in once if paths]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
