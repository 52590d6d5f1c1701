"""An adapter laid out for the device is the same adapter, in memory that nothing else holds on to."""

from dataclasses import replace

import pytest
import torch

from adapterd.deltas import OutputAffine
from adapterd.model.host_layout import lay_out
from tests.model.test_lora import TARGETS, make_adapter, make_bank, upload


def ordinary(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


RANKS = {"q": 7, "k": 1, "up": 16, "down": 3}


def test_a_and_the_transpose_of_b_are_contiguous_and_equal() -> None:
    adapter = make_adapter("a", RANKS)
    found = lay_out(adapter, torch.float32, ordinary)
    assert replace(found, modules=adapter.modules) == adapter
    for before, after in zip(adapter.modules, found.modules, strict=True):
        assert (after.module, after.scale) == (before.module, before.scale)
        assert torch.equal(after.a, before.a)
        assert torch.equal(after.b, before.b)
        assert after.a.is_contiguous()
        assert after.b.T.is_contiguous()


def test_the_bank_holds_the_same_whatever_pages_it_gives() -> None:
    adapter = make_adapter("a", RANKS)
    plain, laid_out = make_bank(64), make_bank(64)
    upload(plain, adapter)
    upload(laid_out, lay_out(adapter, torch.float32, ordinary))
    for module in TARGETS:
        one, other = (bank.products(((adapter.id, 1.0),))[module] for bank in (plain, laid_out))
        for expected, found in zip(one, other, strict=True):
            assert torch.equal(found.a, expected.a)
            assert torch.equal(found.b_t, expected.b_t)


def test_memory_of_the_file_is_let_go() -> None:
    adapter = make_adapter("a", RANKS)
    taken = {matrix.untyped_storage().data_ptr() for m in adapter.modules for matrix in (m.a, m.b)}
    found = lay_out(adapter, torch.float32, ordinary)
    held = {matrix.untyped_storage().data_ptr() for m in found.modules for matrix in (m.a, m.b)}
    assert held
    assert not taken & held


def test_it_is_rounded_to_the_type_of_the_device_and_counted_so() -> None:
    adapter = make_adapter("a", RANKS)
    found = lay_out(adapter, torch.bfloat16, ordinary)
    assert found.num_bytes == adapter.num_bytes // 2
    for before, after in zip(adapter.modules, found.modules, strict=True):
        assert torch.equal(after.a, before.a.bfloat16())
        assert torch.equal(after.b, before.b.bfloat16())


def test_an_adapter_that_changes_more_than_linears_stays_as_it_is() -> None:
    adapter = replace(make_adapter("a", RANKS), edits=(OutputAffine("q", "bias", None, torch.ones(64)),))
    assert lay_out(adapter, torch.float32, ordinary) is adapter


def test_blocks_are_powers_of_two_and_little_is_lost() -> None:
    asked: list[int] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return ordinary(num_bytes)

    adapter = make_adapter("a", {"q": 64, "k": 64, "up": 64, "down": 64})
    lay_out(adapter, torch.float32, allocate)
    assert all(size & (size - 1) == 0 for size in asked[:-1])
    largest = max(m.b.nbytes for m in adapter.modules)
    assert adapter.num_bytes <= sum(asked) <= adapter.num_bytes + largest * len(asked)


def test_without_such_memory_the_adapter_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    blocks = [torch.empty(4096, dtype=torch.uint8)]

    def allocate(num_bytes: int) -> torch.Tensor:
        if not blocks:
            raise RuntimeError("no more")
        return torch.cat([blocks.pop(), ordinary(num_bytes)])

    adapter = make_adapter("a", {"q": 64, "k": 64, "up": 64, "down": 64})
    assert lay_out(adapter, torch.float32, allocate) is adapter
    assert caplog.messages == ["adapter a: no pinned memory, so its uploads take longer: no more"]
