"""Linears of one input as one product on a CUDA device, in layers that are not fused whole: so each of these layers
too launches its adapters' kernels for at most four groups, q, k and v, o, gate and up, down.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from adapterd.model.grouped import LinearGroup, shared_inputs, use_group
from adapterd.model.int8 import Int8Linear
from adapterd.model.launch_triton import LAUNCH_ERRORS
from adapterd.model.lora import LoraLinear
from adapterd.model.lora_triton import MAX_GROUP, TritonLoraStep
from adapterd.model.projection_triton import Projection, kind_of

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Of the largest output. Sums are in another order than the library's, and rounded once as there."""


class ProjectionGroup(LinearGroup):
    def __init__(self, members: Mapping[str, nn.Linear], step: TritonLoraStep) -> None:
        super().__init__(tuple(members), step)
        self._project = Projection(members, step)

    def compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each answer is some columns of one tensor."""
        y = self._project(x.reshape(-1, x.shape[-1]))
        return [
            part.view(*x.shape[:-1], part.shape[1])
            for part in torch.split(y, list(self._project.d_outs), dim=1)
        ]


@torch.inference_mode()
def group_linears(
    model: nn.Module, step: TritonLoraStep, linears: Mapping[str, LoraLinear], run: Callable[[], object]
) -> int:
    """Put together those of `linears` that read one input in `run`, one forward of the model; returns how many groups.

    In a second forward each answer must be the linear's own, or its group is taken apart again.
    """
    groups: list[ProjectionGroup] = []
    for paths in shared_inputs(linears, run):
        for members in _alike({path: linears[path].inner for path in paths}):
            if len(members) > 1:
                groups.append(ProjectionGroup(members, step))
                use_group(model, linears, groups[-1])
    unfit = _unfit(model, groups, run)
    for group in unfit:
        for path in group.paths:
            model.set_submodule(path, linears[path])
    num_kept = len(groups) - len(unfit)
    if groups:
        logger.info("%d groups of linears of one input are one product each", num_kept)
    if unfit:
        logger.info("%d groups were taken apart: their family wants each linear by itself", len(unfit))
    return num_kept


def _alike(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Linear]]:
    """Neighbours that can be one product, at most MAX_GROUP at a time."""
    plain = {
        path: linear
        for path, linear in linears.items()
        if isinstance(linear, nn.Linear) and type(linear) in (nn.Linear, Int8Linear)
    }
    for _, neighbours in groupby(plain.items(), key=lambda item: kind_of(item[1])):
        members = list(neighbours)
        for start in range(0, len(members), MAX_GROUP):
            yield dict(members[start : start + MAX_GROUP])


def _unfit(
    model: nn.Module, groups: Sequence[ProjectionGroup], run: Callable[[], object]
) -> list[ProjectionGroup]:
    """Groups whose members get other answers than their own; all, if the model cannot run with them."""
    found: list[ProjectionGroup] = []
    hooks = []
    for group in groups:

        def check(
            module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor, group: ProjectionGroup = group
        ) -> None:
            assert isinstance(module, LoraLinear)
            own = module.inner(inputs[0]).float()
            bound = _TOLERANCE[output.dtype] * own.abs().max()
            if group not in found and not bool(((output.float() - own).abs() <= bound).all()):
                found.append(group)

        hooks += [model.get_submodule(path).register_forward_hook(check) for path in group.paths]
    try:
        run()
    except LAUNCH_ERRORS as error:
        logger.debug("grouped linears cannot run: %s", error)
        return list(groups)
    finally:
        for hook in hooks:
            hook.remove()
    return found
