"""Which modules of a base work token by token, seen rather than guessed: only these can be edited for some tokens.

In two forwards of different length one looks at every module with weights of its own. If it is called once, and one
axis of its input and of each output follows the number of tokens, then its rows are the tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterd.core import BaseModules
from adapterd.model.experts import is_adaptable
from adapterd.model.int8 import Int8Linear

_NUM_TOKENS = (2, 3)


def find_modules(model: Any, run: Callable[[int], None]) -> BaseModules:
    """Before anything is wrapped; linears may be replaced by others with the same parameters.

    run(n) is a forward of n tokens that returns the logits of all.
    """
    named = dict(model.named_modules())
    owners = {path: module for path, module in named.items() if path and _has_weights(module)}
    calls = [_calls(owners, run, count) for count in _NUM_TOKENS]
    axes = {path: _token_axis(*(seen.get(path, []) for seen in calls)) for path in owners}
    input_axes = {path: axis for path, axis in axes.items() if axis is not None}
    embedding, head = _path(named, model.get_input_embeddings()), _path(named, model.get_output_embeddings())
    tied = (
        embedding
        and head
        and "weight" in named[head]._parameters
        and named[embedding].weight is named[head].weight
    )
    return BaseModules(
        parameters=_shapes(model, named),
        input_axes=input_axes,
        embedding=embedding if embedding in input_axes else None,
        head=head if head in input_axes and isinstance(named[head], nn.Linear) else None,
        is_tied=bool(tied),
        experts={
            path: bool(named[path].is_transposed)
            for path in input_axes
            if is_adaptable(named[path]) and input_axes[path] == 0
        },
        transposed=frozenset(path for path, module in named.items() if isinstance(module, Conv1D)),
    )


def _has_weights(module: nn.Module) -> bool:
    """Of its own; those of a linear in 8 bits are no parameters."""
    return isinstance(module, Int8Linear) or next(module.parameters(recurse=False), None) is not None


def _shapes(model: nn.Module, named: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Of every tensor. A linear in 8 bits has one weight for all who look, however it keeps it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        path, _, part = name.rpartition(".")
        module = named.get(path)
        if isinstance(module, Int8Linear) and part == "values":
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
        elif not (isinstance(module, Int8Linear) and part == "scales"):
            shapes[name] = tuple(tensor.shape)
    return shapes


def _path(named: dict[str, nn.Module], module: nn.Module | None) -> str | None:
    return next((path for path, other in named.items() if other is module), None)


_Shapes = tuple[torch.Size, tuple[torch.Size, ...]]
"""Of the first input, and of each output."""


def _calls(owners: dict[str, nn.Module], run: Callable[[int], None], count: int) -> dict[str, list[_Shapes]]:
    seen: dict[str, list[_Shapes]] = {}

    def note(path: str, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [inputs[0] if inputs else None, *outputs]
        if all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            first, *rest = (tensor.shape for tensor in tensors)
            seen.setdefault(path, []).append((first, tuple(rest)))
        else:
            seen.setdefault(path, []).extend([(torch.Size(), ())] * 2)  # not one call that can be understood

    handles = [
        module.register_forward_hook(lambda _, inputs, output, path=path: note(path, inputs, output))
        for path, module in owners.items()
    ]
    try:
        run(count)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _token_axis(shorter: list[_Shapes], longer: list[_Shapes]) -> int | None:
    if len(shorter) != 1 or len(longer) != 1:
        return None
    (in_shorter, out_shorter), (in_longer, out_longer) = shorter[0], longer[0]
    axes = [_axis(a, b) for a, b in zip((in_shorter, *out_shorter), (in_longer, *out_longer), strict=True)]
    return axes[0] if all(axis is not None for axis in axes) else None


def _axis(shorter: torch.Size, longer: torch.Size) -> int | None:
    """The one axis that counts tokens, all before it being of size 1."""
    if len(shorter) != len(longer):
        return None
    differing = [axis for axis, sizes in enumerate(zip(shorter, longer, strict=True)) if sizes[0] != sizes[1]]
    if len(differing) != 1 or (shorter[differing[0]], longer[differing[0]]) != _NUM_TOKENS:
        return None
    return differing[0]
