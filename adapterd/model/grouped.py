"""Linears of one input that are computed together: q, k and v, or gate and up. How, say grouped_cpu.py and
grouped_triton.py.

Which linears those are is seen, not guessed: in one forward of the model, neighbours below one parent that are handed
the very same tensor. The first of a group to be asked computes all; the others find their answer waiting. A group
checks that this holds in every step, or raises.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapterd.model.lora import LoraLinear, LoraStep


class LinearGroup(ABC):
    """Linears that read one input. `take` gives each its answer, once a step."""

    def __init__(self, paths: Sequence[str], step: LoraStep) -> None:
        self.paths = tuple(paths)
        self.step = step
        self._input: torch.Tensor | None = None
        self._begun = -1
        self._waiting: list[torch.Tensor | None] = []
        self._num_waiting = 0

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The member's product of x, its adapters' included. Raises RuntimeError if the members' inputs differ."""
        # What a step that failed halfway has left is not the next one's.
        if self._input is None or self._begun != self.step.num_begun:
            found = self.compute(x)
            if len(found) == 1:
                return found[0]
            self._input, self._begun = x, self.step.num_begun
            self._waiting, self._num_waiting = list(found), len(found)
        elif self._input is not x:
            raise RuntimeError(f"{self.paths[member]} is asked with another input than {self.paths[0]} was")
        answer = self._waiting[member]
        if answer is None:
            raise RuntimeError(f"{self.paths[member]} is asked twice in one step")
        self._waiting[member] = None
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self._input = None
        return answer

    @abstractmethod
    def compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x: [..., d_in] -> [..., d_out] of each member, the step's adapters included."""


class GroupedLinear(LoraLinear):
    """LoraLinear whose product is its group's."""

    def __init__(self, single: LoraLinear, group: LinearGroup, member: int) -> None:
        super().__init__(single.inner, single.path, single.step)
        self._take = group.take
        self._member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._take(self._member, x)


def use_group(model: nn.Module, wrapped: Mapping[str, LoraLinear], group: LinearGroup) -> None:
    """Put grouped linears in the place of a group's members."""
    for member, path in enumerate(group.paths):
        model.set_submodule(path, GroupedLinear(wrapped[path], group, member))


@dataclass(frozen=True)
class _Call:
    path: str
    input: torch.Tensor


def shared_inputs(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """Paths of those that are handed one input in `run`, one forward of the model, in order of call; many are alone.

    A linear that it does not reach (an expert that no token chose) is in none.
    """
    calls: list[_Call] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: calls.append(_Call(path, inputs[0])))
        for path, module in linears.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return _neighbours(calls)


def _neighbours(calls: Iterable[_Call]) -> list[list[str]]:
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
