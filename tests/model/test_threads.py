"""The program computes with the physical cores it may use, unless the user has said how many."""

from pathlib import Path

import pytest
import torch

from adapterd.model import threads


def test_count_is_within_what_the_machine_has() -> None:
    assert 1 <= threads.num_usable_cores() <= (threads.psutil.cpu_count() or 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000\n", 1), ("800000 100000", 8), ("20000 100000", 1)]
)
def test_container_quota_limits_the_threads(text: str, expected: int, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert threads.quota(file) == expected


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.quota(tmp_path / "cpu.max") is None
    assert threads.quota(tmp_path / "missing") is None


def test_the_users_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads.use_all_cores()
    assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        threads.use_all_cores()
        assert torch.get_num_threads() == threads.num_usable_cores()
    finally:
        torch.set_num_threads(before)
