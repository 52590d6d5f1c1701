"""Rows packed end to end are rows alone: same loss, same gradients, for every family that is served."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapterd.model.attention import ATTENTION_NAME
from adapterd.model.attention_one import Scoring
from adapterd.training.batches import collate, pack, summed_loss
from adapterd.training.data import Example
from adapterd.training.packing import PackedRows, packing_problem
from tests.exactness.families import FAMILIES
from tests.exactness.test_refused import REFUSED
from tests.tiny import tiny_llama

CPU = torch.device("cpu")


def rows(*lengths: tuple[int, int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(3, 300, (p + a,), generator=generator).tolist() for p, a in lengths]
    return [
        Example(i, tuple(ids[:p]), tuple(ids[p:]))
        for i, (ids, (p, _)) in enumerate(zip(draw, lengths, strict=True))
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_served_family_packs(family: str) -> None:
    assert packing_problem(FAMILIES[family]()) is None


@pytest.mark.parametrize("family", ["bloom", "lfm2", "stablelm"])
def test_families_that_read_their_neighbours_are_found_out(family: str) -> None:
    problem = packing_problem(REFUSED[family]())
    assert problem is not None
    assert family in problem


def test_packed_loss_and_gradients_equal_padded_ones(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    examples = rows((5, 3), (40, 2), (1, 1), (12, 9))
    found = {}
    for attention in ("eager", ATTENTION_NAME):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
        packed = attention == ATTENTION_NAME
        batch = pack(examples, device=CPU) if packed else collate(examples, pad_id=2, device=CPU)
        loss, right = summed_loss(model, batch)
        loss.backward()
        found[packed] = loss.item(), right, {n: p.grad for n, p in model.named_parameters()}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert found[True][1] == found[False][1]
    for name, gradient in found[False][2].items():
        assert torch.allclose(
            found[True][2][name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8
        ), name


def test_a_row_does_not_see_its_neighbours(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=ATTENTION_NAME).eval()
    first, second, other = rows((6, 2), (9, 3), (7, 5))
    losses = [
        summed_loss(model, pack(together, device=CPU))[0].item()
        for together in ([first], [second], [first, second], [second, first, other], [other])
    ]
    alone, after = losses[0] + losses[1], losses[3] - losses[4]
    assert losses[2] == pytest.approx(alone, rel=1e-6)
    assert after == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0])])
def test_fused_and_plain_attention_agree_in_values_and_gradients(
    window: int | None, sinks: torch.Tensor | None
) -> None:
    """The plain product is the reference; a softcap too wide to act, or sinks too low to count, makes it run."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((11, 4, 8), (11, 2, 8), (11, 2, 8))
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    outs = []
    for softcap in (None, 1e5):
        if sinks is not None and softcap is None:
            scoring = Scoring(0.5, window, sinks=torch.full((4,), -1e9))
        else:
            scoring = Scoring(0.5, window, softcap)
        out = PackedRows((4, 6, 1)).attend(0, *tensors, scoring)
        outs.append((out, torch.autograd.grad(out.square().sum(), tensors)))
    assert torch.allclose(outs[0][0], outs[1][0], atol=1e-5)
    for one, two in zip(outs[0][1], outs[1][1], strict=True):
        assert torch.allclose(one, two, atol=1e-4)
