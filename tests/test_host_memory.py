"""In a container, sizes by what is free stay within the container's limit."""

import ctypes
from pathlib import Path

import psutil
import pytest

from adapterd.host_memory import free_host_bytes, give_back_freed, group_room

MIB = 2**20
NO_LIMIT_V1 = 9223372036854771712


def write(folder: Path, **files: str | int) -> Path:
    """Files of a group; two underscores in a name stand for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """What /proc/self/cgroup says: a version 2 group at the root of its namespace, as in most containers."""
    file = tmp_path / "own"
    file.write_text("0::/\n")
    return file


def test_room_is_the_limit_less_what_is_used_and_cannot_be_reclaimed(tmp_path: Path, own: Path) -> None:
    stat = f"anon {300 * MIB}\nfile {250 * MIB}\ninactive_file {200 * MIB}\nactive_file {50 * MIB}"
    write(tmp_path, memory__max=1024 * MIB, memory__current=550 * MIB, memory__stat=stat)
    assert group_room(tmp_path, own) == (1024 - 350) * MIB


def test_no_limit_is_none(tmp_path: Path, own: Path) -> None:
    assert group_room(tmp_path, own) is None  # a machine's root group has no such files
    write(tmp_path, memory__max="max", memory__high="max", memory__current=5)
    assert group_room(tmp_path, own) is None
    assert group_room(tmp_path, tmp_path / "missing") is None


def test_the_throttling_limit_counts_too(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory__max=1024 * MIB, memory__high=800 * MIB, memory__current=300 * MIB)
    assert group_room(tmp_path, own) == 500 * MIB


def test_a_group_over_its_limit_has_no_room(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory__max=100 * MIB, memory__current=120 * MIB)
    assert group_room(tmp_path, own) == 0


def test_the_narrowest_group_above_decides(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/kubepods.slice/pod1/container\n")
    write(tmp_path / "kubepods.slice/pod1/container", memory__max="max", memory__current=100 * MIB)
    write(tmp_path / "kubepods.slice/pod1", memory__max=512 * MIB, memory__current=112 * MIB)
    write(tmp_path / "kubepods.slice", memory__max=4096 * MIB, memory__current=2048 * MIB)
    assert group_room(tmp_path, own) == 400 * MIB


def test_version_1_is_read_beside_an_empty_version_2(tmp_path: Path, own: Path) -> None:
    own.write_text("5:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n")
    group = write(
        tmp_path / "memory/docker/1234",
        memory__limit_in_bytes=256 * MIB,
        memory__usage_in_bytes=100 * MIB,
        memory__stat=f"inactive_file 7\ntotal_inactive_file {20 * MIB}",
    )
    write(tmp_path / "memory", memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=9000 * MIB)
    assert group_room(tmp_path, own) == (256 - 80) * MIB
    (group / "memory.limit_in_bytes").write_text(f"{NO_LIMIT_V1}\n")
    room = group_room(tmp_path, own)
    assert room is not None
    assert room > 2**60  # no limit, as version 1 says it: the machine's own memory decides


def test_a_container_finds_its_group_at_the_root_under_the_machines_path(tmp_path: Path, own: Path) -> None:
    own.write_text("5:memory:/kubepods/burstable/pod1/abc\n")
    write(tmp_path / "memory", memory__limit_in_bytes=512 * MIB, memory__usage_in_bytes=12 * MIB)
    assert group_room(tmp_path, own) == 500 * MIB


def test_a_group_outside_the_namespace_is_judged_by_what_is_mounted(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/../other\n")
    root = write(tmp_path / "mounted", memory__max=512 * MIB, memory__current=12 * MIB)
    write(tmp_path / "other", memory__max=1 * MIB, memory__current=0)
    assert group_room(root, own) == 500 * MIB


def test_free_memory_is_never_more_than_the_machine_has() -> None:
    assert 0 <= free_host_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_what_was_freed_goes_back_to_the_system() -> None:
    """Blocks below the size that glibc maps one by one, with one in use above them, so that they stay until asked."""
    c = ctypes.CDLL(None)
    c.malloc.restype = ctypes.c_void_p
    blocks = [c.malloc(ctypes.c_size_t(100_000)) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        c.free(ctypes.c_void_p(block))
    before = psutil.Process().memory_info().rss
    give_back_freed()
    assert psutil.Process().memory_info().rss < before - 50_000_000
    c.free(ctypes.c_void_p(blocks[-1]))
