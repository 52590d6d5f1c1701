"""An adapter laid out for the device is the same adapter, in memory that nothing else holds on to."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapterd.deltas import OutputAffine
from adapterd.model import host_layout
from adapterd.model.host_layout import lay_out
from tests.model.test_lora import TARGETS, make_adapter, make_bank

RANKS = {"q": 7, "k": 1, "up": 16, "down": 3}


def test_a_and_the_transpose_of_b_are_contiguous_and_equal() -> None:
    adapter = make_adapter("a", RANKS)
    found = lay_out(adapter)
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
    plain.upload(adapter)
    laid_out.upload(lay_out(adapter))
    for module in TARGETS:
        one, other = (bank.products(((adapter.id, 1.0),))[module] for bank in (plain, laid_out))
        for expected, found in zip(one, other, strict=True):
            assert torch.equal(found.a, expected.a)
            assert torch.equal(found.b_t, expected.b_t)


def test_memory_of_the_file_is_let_go() -> None:
    adapter = make_adapter("a", RANKS)
    taken = {matrix.untyped_storage().data_ptr() for m in adapter.modules for matrix in (m.a, m.b)}
    found = lay_out(adapter)
    held = {m.untyped_storage().data_ptr(): m.untyped_storage() for x in found.modules for m in (x.a, x.b)}
    assert not taken & held.keys()
    assert adapter.num_bytes <= sum(map(len, held.values())) <= adapter.num_bytes + 64 * 2 * len(RANKS)


def test_types_are_kept_and_may_differ() -> None:
    adapter = make_adapter("a", RANKS)
    modules = tuple(
        replace(m, a=m.a.to(kind), b=m.b.to(kind))
        for m, kind in zip(
            adapter.modules, [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16], strict=True
        )
    )
    found = lay_out(replace(adapter, modules=modules))
    for before, after in zip(modules, found.modules, strict=True):
        assert after.a.dtype == after.b.dtype == before.a.dtype
        assert torch.equal(after.b, before.b)


def test_an_adapter_that_changes_more_than_linears_stays_as_it_is() -> None:
    adapter = replace(make_adapter("a", RANKS), edits=(OutputAffine("q", "bias", None, torch.ones(64)),))
    assert lay_out(adapter) is adapter


def test_pinned_memory_comes_in_blocks_and_without_any_the_adapter_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    own = torch.empty

    def empty(size: int, *, pin_memory: bool = False, **others: Any) -> torch.Tensor:
        if pin_memory:
            asked.append(size)
            if len(asked) > 2:
                raise RuntimeError("no more")
        return own(size, **others)

    monkeypatch.setattr(host_layout.torch, "empty", empty)
    monkeypatch.setattr(host_layout, "_BLOCK_BYTES", 4096)
    adapter = make_adapter("a", RANKS)
    found = lay_out(adapter)
    for before, after in zip(adapter.modules, found.modules, strict=True):
        assert torch.equal(after.a, before.a)
        assert torch.equal(after.b, before.b)
    assert max(asked) <= max(4096, *(m.b.nbytes for m in adapter.modules))
    assert "no pinned memory" in caplog.text
