"""Weights move into large pages: the same numbers, tied as before; and stay where that cannot be."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from adapterd.model import huge_pages
from adapterd.model.huge_pages import HUGE_PAGE_BYTES, use_huge_pages


@pytest.fixture
def model() -> nn.Module:
    """Two large linears of one weight, one of another type, a large buffer, a small linear."""
    torch.manual_seed(0)
    found = nn.ModuleDict({name: nn.Linear(1024, 1024) for name in ("first", "tied", "short")})
    found["tied"].weight = found["first"].weight
    found["short"].to(torch.bfloat16)
    found["small"] = nn.Linear(8, 8)
    found["small"].register_buffer("table", torch.arange(HUGE_PAGE_BYTES).to(torch.int8).view(1024, -1))
    return found.requires_grad_(False)


def let_system_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str) -> None:
    file = tmp_path / "enabled"
    file.write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", file)


def flags_of_memory_at(address: int) -> str:
    """Of the mapping it lies in (docs.kernel.org/filesystems/proc.html, VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError(f"{address:x} lies in no mapping")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no such pages on this system")
def test_tensors_move_and_stay_what_they_were(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    let_system_say(monkeypatch, tmp_path, "always [madvise] never")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    moved = use_huge_pages(model)

    biases = 2 * 4096 + 2048
    assert moved == (4 << 20) + (2 << 20) + (2 << 20) + biases + 8 * 8 * 4 + 64  # of 8 numbers, rounded up
    after = model.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
        assert after[name].data_ptr() != places[name]
        assert " hg" in flags_of_memory_at(after[name].data_ptr())
    assert model["tied"].weight is model["first"].weight
    assert after["first.weight"].data_ptr() % HUGE_PAGE_BYTES == 0


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_without_such_pages_nothing_moves(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None
) -> None:
    let_system_say(monkeypatch, tmp_path, setting or "")
    if setting is None:
        (tmp_path / "enabled").unlink()
    place = model["first"].weight.data_ptr()
    assert use_huge_pages(model) == 0
    assert model["first"].weight.data_ptr() == place


def test_with_little_free_memory_nothing_moves(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    let_system_say(monkeypatch, tmp_path, "[always] madvise never")
    monkeypatch.setattr(huge_pages, "free_host_bytes", lambda: 9 << 20)
    place = model["first"].weight.data_ptr()
    with caplog.at_level("INFO"):
        assert use_huge_pages(model) == 0
    assert model["first"].weight.data_ptr() == place
    assert "weights stay where they were read" in caplog.text


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no such pages on this system")
def test_the_file_is_let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    let_system_say(monkeypatch, tmp_path, "always [madvise] never")
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(1024, 1024), "bias": torch.randn(4)}, file)
    model = nn.Linear(1, 1).requires_grad_(False)
    with safe_open(file, "pt") as tensors:
        model.weight.data, model.bias.data = tensors.get_tensor("weight"), tensors.get_tensor("bias")
    assert str(file) in Path("/proc/self/maps").read_text()
    assert use_huge_pages(model)
    assert str(file) not in Path("/proc/self/maps").read_text()
