"""Layers that are not fused whole launch their adapters' kernels for four groups at most, and compute the same."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from adapterd.model.grouped import GroupedLinear
from adapterd.model.lora import LoraLinear, wrap_linears
from adapterd.model.seams import attach_seams
from tests.model.test_layer_triton import fused_layers, logits, model_of, triton_kernels, with_adapters
from tests.triton_kernels import DEVICE

from adapterd.model.grouped_triton import group_linears  # isort: skip  (needs the interpreter's setting)
from adapterd.model.kernels import Kernels  # isort: skip
from adapterd.model.lora_triton import GroupStep, TritonLoraStep  # isort: skip
from triton.runtime.errors import OutOfResources  # isort: skip


class CountedStep(TritonLoraStep):
    """Notes for which linears each pair of kernels is launched."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pairs: list[tuple[str, ...]] = []

    def group(
        self, paths: Sequence[str], d_outs: Sequence[int], x: torch.Tensor, *, is_beside: bool = False
    ) -> GroupStep | None:
        found = super().group(paths, d_outs, x, is_beside=is_beside)
        if found is not None:
            self.pairs.append(tuple(paths))
        return found


def counted_kernels() -> Kernels:
    return replace(triton_kernels(), lora_step=partial(CountedStep, DEVICE))


@pytest.mark.parametrize(
    ("family", "last_parts"),
    [
        ("gemma2", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("olmo2", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("cohere2", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("glm4", ["q_proj k_proj v_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("starcoder2", ["q_proj k_proj v_proj", "o_proj", "c_fc", "c_proj"]),
        ("mixtral", ["q_proj k_proj v_proj", "o_proj"]),
    ],
)
def test_a_layer_launches_four_pairs_and_adds_adapters_to_the_same_tokens(
    family: str, last_parts: list[str]
) -> None:
    segments, expected = with_adapters(model_of(family))
    grouped = model_of(family)
    seams = attach_seams(grouped, counted_kernels())
    assert fused_layers(grouped) == []
    found = logits(grouped, counted_kernels(), seams, segments)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    step = seams.lora_step
    assert isinstance(step, CountedStep)
    names = [" ".join(path.rpartition(".")[2] for path in paths) for paths in step.pairs]
    assert names == last_parts * grouped.config.num_hidden_layers


@torch.inference_mode()
def test_a_fused_layer_is_not_grouped_and_parameters_keep_their_names_values_and_memory() -> None:
    fused, grouped = model_of("llama"), model_of("gemma2")
    before = {name: tensor.clone() for name, tensor in grouped.state_dict().items()}
    for model in (fused, grouped):
        attach_seams(model, triton_kernels())
    assert not any(isinstance(module, GroupedLinear) for module in fused.modules())
    after = {name.replace(".inner.", "."): tensor for name, tensor in grouped.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    gate, up = (grouped.get_submodule(f"model.layers.0.mlp.{name}") for name in ("gate_proj", "up_proj"))
    assert isinstance(gate, GroupedLinear)
    first, second = gate.inner.weight, up.inner.weight
    assert second.data_ptr() == first.data_ptr() + first.nbytes


class Pair(nn.Module):
    """Two linears of one input, the second of which sees it changed if `changes`, or wants its answer in one piece."""

    def __init__(self, *, changes: bool = False, flattens: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 24)
        self.changes, self.flattens = changes, flattens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        if self.changes:
            x += 1
        b = self.second(x)
        return torch.cat([a, b.view(-1).view(b.shape) if self.flattens else b], -1)


def wrapped_pair(step: TritonLoraStep, model: nn.Module) -> dict[str, LoraLinear]:
    wrap_linears(model.to(DEVICE).requires_grad_(False), step, lambda path: path in ("first", "second"))
    return {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}


@pytest.mark.parametrize(
    ("model", "is_fit"), [(Pair(), True), (Pair(changes=True), False), (Pair(flattens=True), False)]
)
@torch.inference_mode()
def test_linears_that_must_be_asked_one_by_one_stay_alone(
    model: Pair, is_fit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    step = TritonLoraStep(DEVICE)
    linears = wrapped_pair(step, model)
    x = torch.randn(1, 3, 16, device=DEVICE)
    expected = model(x.clone())
    with caplog.at_level(logging.INFO, "adapterd.model.grouped_triton"):
        assert group_linears(model, step, linears, lambda: model(x.clone())) == is_fit
    assert isinstance(model.first, GroupedLinear) == is_fit
    assert ("taken apart" in caplog.text) != is_fit
    torch.testing.assert_close(model(x.clone()), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_groups_that_find_no_room_on_the_chip_are_taken_apart() -> None:
    step, model = TritonLoraStep(DEVICE), Pair()
    linears = wrapped_pair(step, model)
    x = torch.randn(1, 3, 16, device=DEVICE)

    def run() -> None:
        if isinstance(model.first, GroupedLinear):
            raise OutOfResources(300_000, 232_448, "shared memory")
        model(x)

    assert group_linears(model, step, linears, run) == 0
    run()


@torch.inference_mode()
def test_a_group_raises_where_its_members_see_other_inputs_and_forgets_what_a_failed_step_left() -> None:
    step, model = TritonLoraStep(DEVICE), Pair()
    linears = wrapped_pair(step, model)
    x = torch.randn(1, 3, 16, device=DEVICE)
    assert group_linears(model, step, linears, lambda: model(x)) == 1
    step.begin((), 3)
    expected = model(x)
    model.first(x)  # and then the step fails
    with pytest.raises(RuntimeError, match="second is asked with another input than first"):
        model.second(x.clone())
    with pytest.raises(RuntimeError, match="first is asked twice"):
        model.first(x)
    step.begin((), 3)
    other = torch.randn(1, 3, 16, device=DEVICE)
    assert not torch.equal(model(other), expected)
    assert torch.equal(model(x), expected)
