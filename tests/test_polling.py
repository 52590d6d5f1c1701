"""A poller goes on looking whatever a look comes to, takes its time where looking is slow, and ends when it is told."""

import threading
import time

from adapterd.polling import Poller


def test_a_look_that_fails_is_not_the_last() -> None:
    looks = threading.Semaphore(0)

    def look() -> None:
        looks.release()
        raise OSError("no space left on device")

    poller = Poller(look, 0.001, name="test-poll")
    poller.start()
    assert all(looks.acquire(timeout=10) for _ in range(3))
    poller.stop()


def test_a_slow_look_is_followed_by_a_long_rest() -> None:
    began: list[float] = []
    has_looked_twice = threading.Event()

    def look() -> None:
        began.append(time.monotonic())
        if len(began) == 2:
            has_looked_twice.set()
        time.sleep(0.02)

    poller = Poller(look, 0.001, name="test-poll")
    poller.start()
    assert has_looked_twice.wait(10)
    poller.stop()
    assert began[1] - began[0] >= 0.2


def test_stop_waits_for_the_look_under_way_and_is_harmless_before_the_start() -> None:
    is_looking, has_looked = threading.Event(), threading.Event()

    def look() -> None:
        is_looking.set()
        time.sleep(0.05)
        has_looked.set()

    poller = Poller(look, 0.001, name="test-poll")
    poller.start()
    assert is_looking.wait(10)
    poller.stop()
    assert has_looked.is_set()
    Poller(look, 0.001, name="test-poll").stop()
