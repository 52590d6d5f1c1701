"""Adapter memory never fragments, products are exact wherever the pages lie, and tokens of the base are untouched."""

import random
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId
from adapterd.deltas import LoraMatrices
from adapterd.model.lora import LoraBank, LoraLinear, LoraStep, Segment, wrap_linears
from adapterd.model.pages import PageGeometry

CPU = torch.device("cpu")
TARGETS = {"q": (64, 48), "k": (16, 48), "up": (96, 48), "down": (48, 96)}  # (d_out, d_in)


def make_adapter(name: str, ranks: dict[str, int], seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def matrices(module: str, rank: int) -> LoraMatrices:
        d_out, d_in = TARGETS[module]
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        return LoraMatrices(module, a, b, 0.5 + seed % 3)

    modules = tuple(matrices(module, rank) for module, rank in ranks.items())
    return Adapter(
        id=AdapterId(AdapterDigest(f"digest-{name}"), name),
        path=Path(name),
        modules=modules,
        max_rank=max(ranks.values()),
        num_bytes=sum(m.a.nbytes + m.b.nbytes for m in modules),
        base_model_name=None,
        chat_template=None,
        eos_token_ids=None,
        generation_defaults=MappingProxyType({}),
    )


def make_bank(num_pages: int) -> LoraBank:
    page_bytes = PageGeometry.choose(TARGETS).page_elements * 4
    bank = LoraBank(TARGETS, num_pages * page_bytes, torch.float32, CPU)
    assert bank.num_pages == num_pages
    return bank


def upload(bank: LoraBank, adapter: Adapter) -> None:
    bank.take(adapter)
    bank.fill(adapter)


def delta_of(bank: LoraBank, mix: tuple[tuple[AdapterId, float], ...], module: str) -> torch.Tensor:
    """The dense change that a mix makes to one linear's weight: [d_out, d_in]."""
    d_out, d_in = TARGETS[module]
    total = torch.zeros(d_out, d_in)
    for part in bank.products(mix).get(module, ()):
        total += part.scale * part.b_t.T @ part.a
    return total


def expected_delta(adapter: Adapter, module: str) -> torch.Tensor:
    d_out, d_in = TARGETS[module]
    return sum((m.scale * m.b @ m.a for m in adapter.modules if m.module == module), torch.zeros(d_out, d_in))


def test_uploads_succeed_while_pages_suffice_and_stay_exact_through_any_fragmentation() -> None:
    generator = random.Random(1)
    bank = make_bank(120)
    resident: dict[str, Adapter] = {}
    num_free, num_uploads, num_scattered = 120, 0, 0
    for turn in range(400):
        modules = generator.sample(list(TARGETS), generator.randint(1, 4))
        adapter = make_adapter(str(turn), {m: generator.choice([1, 3, 8, 13, 64]) for m in modules}, turn)
        needed = bank.pages_of(adapter)
        while needed > num_free and resident:
            victim = resident.pop(generator.choice(list(resident)))
            bank.evict(victim.id)
            num_free += bank.pages_of(victim)
        if needed > num_free:
            continue
        upload(bank, adapter)
        bank.check_integrity()
        resident[str(turn)] = adapter
        num_free -= needed
        num_uploads += 1
        if turn % 10 == 0:
            for other in resident.values():
                parts = [len(parts) for parts in bank.products(((other.id, 1.0),)).values()]
                num_scattered += max(parts) > 1
                for module in TARGETS:
                    found = delta_of(bank, ((other.id, 1.0),), module)
                    torch.testing.assert_close(found, expected_delta(other, module), atol=1e-4, rtol=1e-5)
    assert num_uploads > 300
    assert num_scattered > 20  # pages of one matrix did lie apart


def test_evicted_pages_serve_another_adapter_and_nobody_else_notices() -> None:
    bank = make_bank(40)
    stays, leaves, comes = (make_adapter(name, {"q": 8, "up": 5}, i) for i, name in enumerate("abc"))
    upload(bank, stays)
    upload(bank, leaves)
    mix = ((stays.id, 1.0),)
    before = delta_of(bank, mix, "q")
    bank.evict(leaves.id)
    upload(bank, comes)
    assert torch.equal(delta_of(bank, mix, "q"), before)
    torch.testing.assert_close(delta_of(bank, ((comes.id, 1.0),), "up"), expected_delta(comes, "up"))
    with pytest.raises(KeyError):
        bank.products(((leaves.id, 1.0),))


def test_mix_adds_its_adapters_each_at_its_factor() -> None:
    bank = make_bank(60)
    first, second = make_adapter("a", {"q": 8, "k": 2}, 1), make_adapter("b", {"q": 3, "up": 4}, 2)
    upload(bank, first)
    upload(bank, second)
    mix = ((first.id, 0.7), (second.id, -0.3))
    for module in TARGETS:
        expected = 0.7 * expected_delta(first, module) - 0.3 * expected_delta(second, module)
        torch.testing.assert_close(delta_of(bank, mix, module), expected, atol=1e-4, rtol=1e-5)


def test_factors_that_nobody_repeats_do_not_pile_up() -> None:
    """Regression: every mix ever asked for was kept until an adapter left."""
    bank = make_bank(20)
    adapter = make_adapter("a", {"q": 4})
    upload(bank, adapter)
    for turn in range(5000):
        bank.products(((adapter.id, 1.0 + turn / 1e6),))
    assert len(bank._mixes) <= 1024
    torch.testing.assert_close(delta_of(bank, ((adapter.id, 2.0),), "q"), 2 * expected_delta(adapter, "q"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(48, 64)
        self.head = nn.Linear(64, 10)


@pytest.fixture
def wrapped() -> tuple[Model, LoraStep, LoraBank, Adapter]:
    torch.manual_seed(0)
    model, step, bank = Model(), LoraStep(), make_bank(30)
    assert wrap_linears(model, step, lambda path: path != "head") == {"q": (64, 48)}
    adapter = make_adapter("a", {"q": 6})
    upload(bank, adapter)
    return model, step, bank, adapter


@torch.inference_mode()
def test_segments_change_their_own_tokens_alone(wrapped: tuple[Model, LoraStep, LoraBank, Adapter]) -> None:
    model, step, bank, adapter = wrapped
    x = torch.randn(1, 9, 48)
    plain = model.q(x)
    products = bank.products(((adapter.id, 1.0),))
    step.segments, step.num_tokens = (Segment(2, 4, products), Segment(7, 9, products)), 9
    found = model.q(x)
    for token in range(9):
        if token in (2, 3, 7, 8):
            expected = plain[0, token] + expected_delta(adapter, "q") @ x[0, token]
            torch.testing.assert_close(found[0, token], expected, atol=1e-4, rtol=1e-5)
        else:
            assert torch.equal(found[0, token], plain[0, token])
    step.segments = ()
    assert torch.equal(model.q(x), plain)


@torch.inference_mode()
def test_linear_that_sees_a_part_of_the_tokens_raises(
    wrapped: tuple[Model, LoraStep, LoraBank, Adapter],
) -> None:
    model, step, bank, adapter = wrapped
    step.segments, step.num_tokens = (Segment(0, 9, bank.products(((adapter.id, 1.0),))),), 9
    with pytest.raises(RuntimeError, match="q saw 4 of 9 tokens"):
        model.q(torch.randn(1, 4, 48))


def test_head_and_other_modules_stay_as_they_are(wrapped: tuple[Model, LoraStep, LoraBank, Adapter]) -> None:
    model = wrapped[0]
    assert isinstance(model.q, LoraLinear)
    assert type(model.head) is nn.Linear
    assert isinstance(model.q.inner, nn.Linear)
