import random
from collections import Counter

from adapterd.core import BASE_MIX, AdapterDigest, AdapterId, AdapterMix
from adapterd.engine.slots import AdapterSlots

PAGES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "whale": 11}
NUM_PAGES = 10


def adapter(name: str) -> AdapterId:
    return AdapterId(AdapterDigest(name), name)


def mix(*names: str) -> AdapterMix:
    return tuple((adapter(name), 1.0) for name in names)


def make_slots(*resident: str) -> AdapterSlots:
    slots = AdapterSlots(NUM_PAGES, lambda adapter_id: PAGES[adapter_id.digest])
    slots.load(mix(*resident))
    for name in resident:
        slots.arrived(adapter(name))
    slots.take_moves()
    return slots


def names(ids: object) -> list[str]:
    return [adapter_id.name for adapter_id in ids]  # type: ignore[attr-defined]


def test_base_needs_nothing_and_moves_nothing() -> None:
    slots = make_slots()
    assert slots.is_ready(BASE_MIX)
    slots.hold(BASE_MIX)
    assert slots.take_moves() == ((), ())
    assert slots.num_held_pages == 0
    slots.release(BASE_MIX)


def test_adapter_is_booked_at_once_and_ready_when_it_has_arrived() -> None:
    slots = make_slots()
    slots.load(mix("a", "b"))
    assert slots.is_booked(mix("a", "b"))
    assert slots.num_free_pages == 5
    assert slots.take_moves() == ((), (adapter("a"), adapter("b")))
    slots.arrived(adapter("a"))
    assert slots.is_ready(mix("a"))
    assert not slots.is_ready(mix("a", "b"))
    assert names(slots.resident) == ["a"]
    assert names(slots.idle()) == ["a"]  # b is being written: its pages cannot be taken
    slots.arrived(adapter("b"))
    assert slots.is_ready(mix("a", "b"))
    slots.check_integrity()


def test_mix_misses_what_is_not_booked_and_each_adapter_once() -> None:
    slots = make_slots("a")
    assert slots.num_missing_pages(mix("a", "b", "c", "b")) == 7
    slots.load(mix("a", "b", "b"))
    assert slots.num_missing_pages(mix("a", "b", "c")) == 4
    assert slots.num_free_pages == 5
    assert slots.take_moves() == ((), (adapter("b"),))


def test_idle_are_those_that_nobody_holds_or_has_pinned_longest_unused_first() -> None:
    slots = make_slots("a", "b", "c")
    slots.pin(adapter("b"))
    for name in ("c", "a"):
        slots.hold(mix(name))
    assert names(slots.idle()) == []
    assert names(slots.held()) == ["c", "a"]
    slots.release(mix("c"))
    slots.release(mix("a"))
    assert names(slots.idle()) == ["c", "a"]
    slots.unpin(adapter("b"))
    assert names(slots.idle()) == ["b", "c", "a"]


def test_what_fits_beside_pinned_adapters_fits_once_they_count_only_once() -> None:
    slots = make_slots("d")
    slots.pin(adapter("d"))
    assert slots.can_ever_hold(mix("c"))
    assert slots.can_ever_hold(mix("d", "c"))
    assert not slots.can_ever_hold(mix("e"))
    slots.pin(adapter("c"))  # has not come yet, but will
    assert not slots.can_ever_hold(mix("a"))
    assert slots.can_ever_hold(mix("d", "c"))


def test_retired_adapter_leaves_when_its_last_holder_does() -> None:
    slots = make_slots("a")
    slots.pin(adapter("a"))
    slots.hold(mix("a"))
    slots.hold(mix("a"))
    slots.retire(adapter("a"))
    slots.release(mix("a"))
    assert names(slots.resident) == ["a"]
    slots.release(mix("a"))
    assert slots.resident == ()
    assert slots.pinned == ()
    slots.retire(adapter("a"))  # harmless


def test_adapter_retired_on_its_way_leaves_when_it_arrives() -> None:
    slots = make_slots()
    slots.load(mix("a"))
    slots.take_moves()
    slots.retire(adapter("a"))
    assert slots.num_free_pages == 8
    slots.arrived(adapter("a"))
    assert slots.num_free_pages == NUM_PAGES
    assert slots.take_moves() == ((adapter("a"),), ())


def test_adapter_pinned_again_before_it_could_leave_stays() -> None:
    """Regression: it left although pinned, and came back only when somebody asked for it."""
    slots = make_slots("b")
    slots.load(mix("a"))
    slots.hold(mix("b"))
    for name in ("a", "b"):
        slots.retire(adapter(name))
        slots.pin(adapter(name))
    slots.arrived(adapter("a"))
    slots.release(mix("b"))
    assert {*slots.resident} == {*slots.pinned} == {adapter("a"), adapter("b")}
    slots.check_integrity()


def test_idle_adapter_that_is_retired_leaves_at_once() -> None:
    slots = make_slots("a")
    slots.retire(adapter("a"))
    assert slots.num_free_pages == NUM_PAGES
    assert slots.take_moves() == ((adapter("a"),), ())


def test_size_of_what_has_pages_stands_in_the_books() -> None:
    """Whose weights have left host memory can be asked for nothing any more."""
    held = {adapter("a"): 2, adapter("b"): 3}
    slots = AdapterSlots(NUM_PAGES, held.__getitem__)
    slots.load(mix("a"))
    slots.pin(adapter("a"))
    del held[adapter("a")]
    assert (slots.size(adapter("a")), slots.size(adapter("b"))) == (2, 3)
    assert slots.num_missing_pages(mix("a", "b")) == 3
    assert slots.can_ever_hold(mix("b"))


def test_books_balance_on_a_long_random_walk_and_the_moves_can_be_carried_out() -> None:
    """A mirror carries the moves out as the runner does: evictions, then uploads, within the pages there are."""
    generator = random.Random(3)
    slots = make_slots()
    held: list[AdapterMix] = []
    on_device: set[AdapterId] = set()
    on_the_way: list[AdapterId] = []
    for _ in range(8000):
        action = generator.random()
        wanted = mix(*generator.choices(list(PAGES), k=generator.choice([1, 1, 1, 2])))
        if held and action < 0.3:
            slots.release(held.pop(generator.randrange(len(held))))
        elif on_the_way and action < 0.6:
            slots.arrived(on_the_way.pop(0))
        elif action < 0.85:
            for adapter_id in list(slots.idle()):
                if slots.num_missing_pages(wanted) > slots.num_free_pages and adapter_id not in dict(wanted):
                    slots.evict(adapter_id)
            if slots.num_missing_pages(wanted) <= slots.num_free_pages:
                slots.load(wanted)
            if slots.is_ready(wanted):
                slots.hold(wanted)
                held.append(wanted)
        elif action < 0.9:
            slots.retire(adapter(generator.choice(list(PAGES))))
        elif action < 0.95:
            slots.pin(adapter("a"))
        else:
            slots.unpin(adapter("a"))
        slots.check_integrity()
        holders = Counter(adapter_id for some in held for adapter_id, _ in some)
        assert set(holders) <= set(slots.resident)
        assert slots.num_held_pages == sum(PAGES[adapter_id.digest] for adapter_id in holders)
        evictions, uploads = slots.take_moves()
        for adapter_id in evictions:
            on_device.remove(adapter_id)
        for adapter_id in uploads:
            assert adapter_id not in on_device
            on_device.add(adapter_id)
            on_the_way.append(adapter_id)
        assert sum(PAGES[adapter_id.digest] for adapter_id in on_device) == NUM_PAGES - slots.num_free_pages
    assert slots.num_uploads > 1000
    assert adapter("whale") not in on_device
