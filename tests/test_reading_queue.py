"""Weights that have left memory come back once for all who wait, in turn, and only while there is room."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId
from adapterd.errors import AdapterRefused, Unavailable
from adapterd.names import Version
from adapterd.reading_queue import ReadingQueue

PATIENCE_SECONDS = 20.0


def version(name: str, num_bytes: int = 1) -> Version:
    return Version(1, AdapterId(AdapterDigest(name), name), Path(name), num_bytes, 8, (), 0.0)


class Memory:
    """`room` bytes; readings end when `gate` is open, and name what was read in order."""

    def __init__(self, pool: ThreadPoolExecutor, room: int) -> None:
        self.room = room
        self.least_room = room
        self.read: list[str] = []
        self.gate = threading.Event()
        self._lock = threading.Lock()
        self.readings = ReadingQueue(lambda version: pool, self._read, self._reserve, self._release)

    def _read(self, version: Version) -> Adapter:
        assert self.gate.wait(PATIENCE_SECONDS)
        with self._lock:
            self.read.append(version.id.name)
        if version.id.name == "broken":
            raise AdapterRefused("its file is cut off")
        return Adapter(version.id, version.path, (), 8, version.num_bytes, None, None, None, {})

    def _reserve(self, num_bytes: int) -> bool:
        with self._lock:
            if num_bytes > self.room:
                return False
            self.room -= num_bytes
            self.least_room = min(self.least_room, self.room)
            return True

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self.room += num_bytes


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as found:
        yield found


def name_of(done: "Future[object]") -> str:
    adapter = done.result(PATIENCE_SECONDS)
    assert isinstance(adapter, Adapter)
    return adapter.id.name


def test_version_is_read_once_for_all_who_wait(pool: ThreadPoolExecutor) -> None:
    memory = Memory(pool, room=1)
    first, second = memory.readings.of(version("a")), memory.readings.of(version("a"))
    memory.gate.set()
    assert name_of(first) == name_of(second) == "a"
    assert memory.read == ["a"]
    assert name_of(memory.readings.of(version("a"))) == "a"
    assert memory.read == ["a", "a"]


def test_nobody_overtakes_a_large_one_that_waits_for_room(pool: ThreadPoolExecutor) -> None:
    memory = Memory(pool, room=2)
    memory.gate.set()
    memory.room = 0  # requests hold it
    waiting = [memory.readings.of(version(name, size)) for name, size in (("large", 2), ("b", 1), ("c", 1))]
    memory.room = 1
    memory.readings.begin()
    assert not any(done.done() for done in waiting)
    memory.room = 2
    memory.readings.begin()
    assert [name_of(done) for done in waiting] == ["large", "b", "c"]
    assert memory.read[0] == "large"
    assert memory.room == 2


def test_error_is_told_to_all_who_wait_and_the_next_one_is_read(pool: ThreadPoolExecutor) -> None:
    memory = Memory(pool, room=1)
    waiting = [memory.readings.of(version(name)) for name in ("broken", "broken", "b")]
    memory.gate.set()
    for done in waiting[:2]:
        with pytest.raises(AdapterRefused, match="cut off"):
            done.result(PATIENCE_SECONDS)
    assert name_of(waiting[2]) == "b"
    assert memory.room == 1


def test_shutting_down_leaves_nobody_waiting(pool: ThreadPoolExecutor) -> None:
    memory = Memory(pool, room=6)
    waiting = [memory.readings.of(version(f"n{number}")) for number in range(9)]
    memory.readings.close()
    with pytest.raises(Unavailable, match="shutting down"):
        memory.readings.of(version("late"))
    pool.shutdown(wait=False, cancel_futures=True)
    memory.gate.set()
    errors = [done.exception(PATIENCE_SECONDS) for done in waiting]
    assert errors[:4] == [None] * 4
    assert all(isinstance(error, Unavailable) for error in errors[4:])


def test_threads_that_ask_at_once_all_get_theirs_within_the_room(pool: ThreadPoolExecutor) -> None:
    memory = Memory(pool, room=7)
    memory.gate.set()
    found: list[tuple[str, str]] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(50):
            number = draw.randrange(20)
            found.append((f"n{number}", name_of(memory.readings.of(version(f"n{number}", 1 + number % 3)))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400
    assert all(asked == got for asked, got in found)
    assert memory.room == 7
    assert memory.least_room >= 0
