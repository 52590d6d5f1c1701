"""What pinned names mean is what device memory keeps."""

import threading
from collections.abc import Iterator

import pytest

from adapterd.core import AdapterDigest, AdapterId, AdapterMix
from adapterd.device_pins import DevicePins
from adapterd.errors import AdapterRefused, Overloaded, Unavailable
from tests.adapters_on_disk import until

A, B, C = (AdapterId(AdapterDigest(letter * 64), letter) for letter in "abc")


class Device:
    """Has room for `room` adapters; pins only what is leased."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pinned: list[AdapterId] = []
        self.leased: list[AdapterId] = []
        self.read: list[AdapterId] = []
        self.prefetched: list[AdapterId] = []
        self.wanted: frozenset[AdapterId] = frozenset()

    def pin(self, adapter_id: AdapterId) -> None:
        assert adapter_id in self.leased
        if len(self.pinned) >= self.room:
            raise Overloaded("pinned adapters take it all")
        self.pinned.append(adapter_id)

    def unpin(self, adapter_id: AdapterId) -> None:
        """Harmless if it is not pinned, as the engine's."""
        self.pinned = [pinned for pinned in self.pinned if pinned != adapter_id]

    def prefetch(self, adapter_id: AdapterId) -> None:
        assert adapter_id in self.leased
        self.prefetched.append(adapter_id)

    def lease(self, mix: AdapterMix) -> "Device":
        assert mix[0][0] in self.read
        self.leased.append(mix[0][0])
        return self

    def release(self) -> None:
        self.leased.pop()


@pytest.fixture
def device() -> Device:
    return Device(room=2)


@pytest.fixture
def pins(device: Device) -> Iterator[DevicePins]:
    made = DevicePins(lambda: device, lambda: device.wanted, device.read.append, device.lease)
    made.start()
    yield made
    made.stop()
    assert device.leased == []


def want(pins: DevicePins, device: Device, wanted: frozenset[AdapterId]) -> None:
    device.wanted = wanted
    pins.follow()


def test_pins_follow_what_is_wanted(pins: DevicePins, device: Device) -> None:
    want(pins, device, frozenset({A, B}))
    for adapter_id in (A, B):
        pins.wait(adapter_id, 5)
    assert {*device.pinned} == {A, B}
    # A name moves on to another version: the old one's room is the new one's.
    want(pins, device, frozenset({A, C}))
    pins.wait(C, 5)
    assert {*device.pinned} == {A, C}
    want(pins, device, frozenset())
    until(lambda: device.pinned == [])


def test_who_finds_no_room_is_told_and_served_when_there_is_some(pins: DevicePins, device: Device) -> None:
    device.room = 1
    want(pins, device, frozenset({A}))
    pins.wait(A, 5)
    want(pins, device, frozenset({A, B}))
    with pytest.raises(Overloaded):
        pins.wait(B, 5)
    want(pins, device, frozenset({B}))
    pins.wait(B, 5)
    assert device.pinned == [B]


def test_weights_that_cannot_be_read_are_an_error_of_their_own(device: Device) -> None:
    def read(adapter_id: AdapterId) -> None:
        if adapter_id == A:
            raise AdapterRefused("its folder is gone")
        device.read.append(adapter_id)

    pins = DevicePins(lambda: device, lambda: frozenset({A, B}), read, device.lease)
    pins.start()
    pins.follow()
    pins.wait(B, 5)
    with pytest.raises(AdapterRefused):
        pins.wait(A, 5)
    pins.stop()


def test_error_that_nobody_foresaw_is_told_and_later_pins_are_followed(device: Device) -> None:
    """Regression: the thread died of a disk's error, and from then on every pin seemed to succeed."""

    def read(adapter_id: AdapterId) -> None:
        if adapter_id == A:
            raise OSError("input/output error")
        device.read.append(adapter_id)

    pins = DevicePins(lambda: device, lambda: device.wanted, read, device.lease)
    pins.start()
    want(pins, device, frozenset({A}))
    with pytest.raises(Unavailable, match="'a' could not be read: OSError"):
        pins.wait(A, 5)
    want(pins, device, frozenset({A, B}))
    pins.wait(B, 5)
    pins.stop()
    assert device.pinned == [B]


def test_pin_that_takes_too_long_is_no_success(device: Device) -> None:
    is_readable = threading.Event()

    def read(adapter_id: AdapterId) -> None:
        assert is_readable.wait(5)
        device.read.append(adapter_id)

    pins = DevicePins(lambda: device, lambda: device.wanted, read, device.lease)
    pins.start()
    want(pins, device, frozenset({A}))
    with pytest.raises(Unavailable, match=r"'a' is not pinned after 0\.01 s"):
        pins.wait(A, 0.01)
    is_readable.set()
    pins.wait(A, 5)
    pins.stop()


def test_waiting_ends_when_it_is_wanted_no_more(pins: DevicePins, device: Device) -> None:
    pins.wait(A, 0.01)
    threads = [threading.Thread(target=pins.wait, args=(A, 5)) for _ in range(2)]
    for thread in threads:
        thread.start()
    want(pins, device, frozenset())
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_what_the_engine_was_told_to_drop_is_pinned_again_if_it_is_still_wanted(
    pins: DevicePins, device: Device
) -> None:
    want(pins, device, frozenset({A}))
    pins.wait(A, 5)
    # A pinned name went on to another version and came back before anybody looked: the engine has heard of the end
    # of its version, and pins see no change.
    device.pinned.clear()
    pins.dropped(A)
    until(lambda: device.pinned == [A])
    want(pins, device, frozenset())
    until(lambda: device.pinned == [])
    pins.dropped(A)
    want(pins, device, frozenset({B}))
    pins.wait(B, 5)
    assert device.pinned == [B]


def test_what_is_dropped_while_it_is_being_pinned_is_pinned_again() -> None:
    class DropsOnce(Device):
        has_dropped = False

        def pin(self, adapter_id: AdapterId) -> None:
            super().pin(adapter_id)
            if not self.has_dropped:
                self.has_dropped = True
                self.pinned.clear()
                pins.dropped(adapter_id)

    dropping = DropsOnce(room=2)
    pins = DevicePins(lambda: dropping, lambda: frozenset({A}), dropping.read.append, dropping.lease)
    pins.start()
    pins.follow()
    until(lambda: dropping.pinned == [A])
    pins.stop()
    assert dropping.has_dropped


def test_pin_whose_upload_fails_is_an_error_until_others_are_wanted(pins: DevicePins, device: Device) -> None:
    """Regression: nobody was told, so it passed for pinned and was never tried again."""
    want(pins, device, frozenset({A}))
    pins.wait(A, 5)
    pins.failed(A, "no such matrix")
    with pytest.raises(Unavailable, match="'a' could not be uploaded: no such matrix"):
        pins.wait(A, 5)
    until(lambda: device.pinned == [])
    assert device.read == [A]
    want(pins, device, frozenset({A, B}))
    pins.wait(A, 5)
    assert device.read.count(A) == 2


def test_prefetch_holds_the_weights_while_the_engine_takes_them(pins: DevicePins, device: Device) -> None:
    pins.prefetch(A)
    assert (device.prefetched, device.leased, device.pinned) == ([A], [], [])
