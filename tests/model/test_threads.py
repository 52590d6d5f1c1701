"""The program computes with the physical cores it may use, unless the user has said how many."""

from collections.abc import Iterable, Set
from pathlib import Path

import pytest
import torch

from adapterd.model import threads

# Of each processor, the processors of its core.
PLAIN_2 = [[0], [1]]
SMT_2 = [[0, 1]] * 2
SMT_64_NEIGHBOURS = [[n & ~1, n | 1] for n in range(64)]
SMT_128 = [[n % 64, n % 64 + 64] for n in range(128)]  # as Linux numbers them: one thread of each core first
SMT4_128 = [[4 * (n // 4) + i for i in range(4)] for n in range(128)]


def processors(folder: Path, siblings: Iterable[list[int]], name: str = "core_cpus_list") -> Path:
    """A tree like /sys/devices/system/cpu."""
    for number, core in enumerate(siblings):
        topology = folder / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / name).write_text(",".join(map(str, core)) + "\n")
        # Linux writes these too; on such a machine they repeat in every die.
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core[0] % 8}\n")
    return folder


@pytest.mark.parametrize(
    ("siblings", "allowed", "expected"),
    [
        (PLAIN_2, {0, 1}, 2),
        (PLAIN_2, {1}, 1),
        (SMT_2, {0, 1}, 1),
        (SMT_64_NEIGHBOURS, set(range(64)), 32),
        (SMT_64_NEIGHBOURS, set(range(32)), 16),
        (SMT_64_NEIGHBOURS, set(range(0, 64, 2)), 32),
        (SMT_64_NEIGHBOURS, {0, 2}, 2),
        (SMT_64_NEIGHBOURS, {0, 1}, 1),
        (SMT_128, set(range(128)), 64),
        (SMT_128, set(range(64)), 64),
        (SMT_128, set(range(32, 96)), 64),
        (SMT_128, {5, 69}, 1),
        (SMT_128, {5, 6}, 2),
        (SMT4_128, set(range(128)), 32),
        (SMT4_128, set(range(64)), 16),
    ],
)
def test_cores_are_counted_whose_threads_are_allowed(
    siblings: list[list[int]], allowed: Set[int], expected: int, tmp_path: Path
) -> None:
    assert threads.num_cores(allowed, processors(tmp_path, siblings)) == expected


def test_older_kernels_call_the_file_otherwise(tmp_path: Path) -> None:
    folder = processors(tmp_path, SMT_128, name="thread_siblings_list")
    assert threads.num_cores(set(range(64)), folder) == 64


def test_without_a_topology_cores_are_not_guessed(tmp_path: Path) -> None:
    assert threads.num_cores({0, 1}, tmp_path) is None
    processors(tmp_path, PLAIN_2)
    assert threads.num_cores({0, 1, 2}, tmp_path) is None  # of the third nothing is said


def test_count_is_within_what_the_machine_has() -> None:
    assert 1 <= threads.num_usable_cores() <= (threads.psutil.cpu_count() or 1)


def own_groups(folder: Path, lines: str) -> Path:
    """What /proc/self/cgroup says."""
    file = folder / "own"
    file.write_text(lines)
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [("150000 100000\n", 1), ("800000 100000", 8), ("20000 100000", 1), ("max 100000\n", None)],
)
def test_a_containers_quota_limits_the_threads(text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert threads.quota(tmp_path, own_groups(tmp_path, "0::/\n")) == expected


def test_a_services_quota_on_a_host_is_seen(tmp_path: Path) -> None:
    """systemd's CPUQuota is written into the service's own group; the root of the machine has no such file."""
    service = tmp_path / "system.slice" / "adapterd.service"
    service.mkdir(parents=True)
    (service / "cpu.max").write_text("400000 100000\n")
    own = own_groups(tmp_path, "0::/system.slice/adapterd.service\n")
    assert threads.quota(tmp_path, own) == 4
    (service.parent / "cpu.max").write_text("200000 100000\n")
    assert threads.quota(tmp_path, own) == 2


def test_version_1_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "docker" / "1234"
    group.mkdir(parents=True)
    for folder, microseconds in ((group, 300000), (tmp_path / "cpu", -1)):
        (folder / "cpu.cfs_quota_us").write_text(f"{microseconds}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    own = own_groups(tmp_path, "5:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n")
    assert threads.quota(tmp_path, own) == 3
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert threads.quota(tmp_path, own) is None


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    assert threads.quota(tmp_path, tmp_path / "missing") is None


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
