"""Layers of the Llama kind run in one C++ call for all that follow one another, and compute what they did before."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from adapterd.model.kernels import NATIVE_KERNELS
from adapterd.model.layer_cpu import NativeLayer
from adapterd.model.seams import attach_seams
from tests import layer_models
from tests.layer_models import logits, with_adapters
from tests.native_kernels import require_native_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def model_of(family: str) -> Any:
    return layer_models.model_of(family, CPU)


def fused_layers(model: nn.Module) -> list[NativeLayer]:
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), NativeLayer)]


def runs_of(model: nn.Module) -> list[int]:
    """How many layers each call will compute, from now on."""
    found: list[int] = []
    for layer in fused_layers(model):

        def compute(run: Sequence[NativeLayer], *rest: Any, own: Any = layer.compute) -> torch.Tensor:
            found.append(len(run))
            return own(run, *rest)

        layer.compute = compute  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_all_layers_are_one_call_and_add_adapters_to_the_same_tokens(family: str) -> None:
    segments, expected = with_adapters(model_of(family))
    fused = model_of(family)
    seams = attach_seams(fused, NATIVE_KERNELS)
    runs = runs_of(fused)
    for _ in range(2):
        runs.clear()
        found = logits(fused, NATIVE_KERNELS, seams, segments)
        assert runs == [3]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


def test_a_layer_of_another_kind_ends_a_call() -> None:
    segments, expected = with_adapters(model_of("smollm3"))
    fused = model_of("smollm3")
    seams = attach_seams(fused, NATIVE_KERNELS)
    assert len(fused_layers(fused)) == 2
    runs = runs_of(fused)
    found = logits(fused, NATIVE_KERNELS, seams, segments)
    assert runs == [1, 1]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(("edited", "expected_runs"), [(0, [2]), (1, [1, 1]), (2, [2])])
def test_an_edited_layer_computes_itself_and_the_others_are_still_together(
    edited: int, expected_runs: list[int]
) -> None:
    model = model_of("qwen3")
    seams = attach_seams(model, NATIVE_KERNELS)
    runs = runs_of(model)
    path = f"model.layers.{edited}.mlp"
    seen: list[torch.Tensor] = []

    def edit(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return output * 2

    before = logits(model, NATIVE_KERNELS, seams, ())
    hook = model.get_submodule(path).register_forward_hook(edit)
    seams.lora_step.edited = frozenset({path})
    runs.clear()
    changed = logits(model, NATIVE_KERNELS, seams, ())
    assert runs == expected_runs
    assert len(seen) == 1
    assert not torch.allclose(changed, before, atol=1e-3)

    hook.remove()
    seams.lora_step.edited = frozenset()
    runs.clear()
    assert torch.equal(logits(model, NATIVE_KERNELS, seams, ()), before)
    assert runs == [3]


def test_a_forward_that_broke_off_leaves_nothing_to_the_next() -> None:
    """The first layer had computed the others, who were never asked; then it is edited and computes itself alone."""
    model, other = model_of("qwen3"), model_of("qwen3")
    seams, other_seams = attach_seams(model, NATIVE_KERNELS), attach_seams(other, NATIVE_KERNELS)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model, NATIVE_KERNELS, seams, ())
    hook.remove()
    runs = runs_of(model)
    for one in (seams, other_seams):
        one.lora_step.edited = frozenset({"model.layers.0.mlp"})
    found = logits(model, NATIVE_KERNELS, seams, ())
    assert runs == [2]
    assert torch.equal(found, logits(other, NATIVE_KERNELS, other_seams, ()))
