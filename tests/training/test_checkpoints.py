"""Checkpoints are whole or absent: damaged files, full disks, other runs."""

import os
from pathlib import Path

import pytest
import torch

from adapterd.training.checkpoints import Checkpoints, only_run
from adapterd.training.errors import ResumeRefused

IDENTITY = {"seed": "1", "rank": "8"}


def state(value: float) -> dict[str, object]:
    return {"weights": {"a": torch.full((3,), value)}, "history": [(1, 0.5, None)]}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", IDENTITY)


def files(checkpoints: Checkpoints) -> list[Path]:
    return sorted(checkpoints.directory.iterdir())


def test_the_newest_comes_back_and_two_are_kept(checkpoints: Checkpoints) -> None:
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        assert checkpoints.save(step, state(float(step)))
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"]["a"], torch.full((3,), 3.0))
    assert [path.name[:9] for path in files(checkpoints)] == ["000000002", "000000003"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_newest_falls_back_and_says_so(
    damage: str, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.save(1, state(1.0))
    checkpoints.save(2, state(2.0))
    newest = files(checkpoints)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": bytes(data[: len(data) // 2]), "flip": bytes(data), "empty": b""}[damage])
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert "checkpoint 000000002 is damaged" in caplog.text


def test_nothing_but_damage_is_refused_not_begun_anew(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1.0))
    files(checkpoints)[0].write_bytes(b"")
    with pytest.raises(ResumeRefused, match="--no-resume"):
        checkpoints.load()


def test_another_run_is_refused_naming_all_that_differs(checkpoints: Checkpoints) -> None:
    checkpoints.save(7, state(1.0))
    other = Checkpoints(checkpoints.directory, {"seed": "2", "rank": "8", "dtype": "float32"})
    with pytest.raises(
        ResumeRefused, match=r"after step 7.*dtype was None and is float32; seed was 1 and is 2\. "
    ):
        other.load()


def test_a_write_cut_short_leaves_no_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1.0))
    (checkpoints.directory / ".2.999.tmp").write_bytes(b"half")
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_costs_the_new_checkpoint_and_no_old_one(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.save(1, state(1.0))
    (checkpoints.directory / f".2.{os.getpid()}.tmp").symlink_to("/dev/full")
    assert not checkpoints.save(2, state(2.0))
    assert "No space left on device" in caplog.text
    assert "that of step 1 stands" in caplog.text
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert [path.name[:9] for path in files(checkpoints)] == ["000000001"]
    assert checkpoints.save(3, state(3.0))


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with (
        only_run(tmp_path / "new" / ".runs" / "a") as directory,
        pytest.raises(ResumeRefused, match="at work"),
        only_run(directory),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_in_a_runs_directory_stays(tmp_path: Path) -> None:
    with only_run(tmp_path / ".runs" / "a") as directory:
        (directory / "x").touch()
    assert (tmp_path / ".runs" / "a" / "x").exists()
