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


def make_slots() -> AdapterSlots:
    return AdapterSlots(NUM_PAGES, lambda adapter_id: PAGES[adapter_id.digest])


def names(ids: tuple[AdapterId, ...]) -> list[str]:
    return [adapter_id.name for adapter_id in ids]


def test_base_holds_nothing_and_moves_nothing() -> None:
    slots = make_slots()
    assert slots.hold(BASE_MIX)
    assert slots.take_moves() == ((), ())
    assert slots.num_held_pages == 0
    slots.release(BASE_MIX)


def test_longest_unused_idle_adapter_leaves_first() -> None:
    slots = make_slots()
    for name in ("a", "b", "c"):
        assert slots.hold(mix(name))
        slots.release(mix(name))
    assert slots.hold(mix("a"))
    slots.release(mix("a"))
    slots.take_moves()
    assert slots.hold(mix("b", "d"))  # 1 free and 2 of a do not do; c goes, being unused longest
    evictions, uploads = slots.take_moves()
    assert (names(evictions), names(uploads)) == (["c"], ["d"])


def test_held_adapter_is_never_evicted() -> None:
    slots = make_slots()
    assert slots.hold(mix("e"))
    assert not slots.hold(mix("d"))
    assert names(slots.resident) == ["e"]
    slots.release(mix("e"))
    assert slots.hold(mix("d"))
    assert names(slots.resident) == ["d"]


def test_mix_that_finds_no_room_changes_nothing() -> None:
    slots = make_slots()
    assert slots.hold(mix("c"))
    assert slots.hold(mix("b"))
    slots.release(mix("b"))
    slots.take_moves()
    assert not slots.hold(mix("a", "d"))
    assert slots.take_moves() == ((), ())
    assert names(slots.resident) == ["c", "b"]


def test_retired_adapter_leaves_when_its_last_holder_does() -> None:
    slots = make_slots()
    assert slots.hold(mix("a"))
    assert slots.hold(mix("a"))
    slots.retire(adapter("a"))
    slots.release(mix("a"))
    assert names(slots.resident) == ["a"]
    slots.release(mix("a"))
    assert slots.resident == ()
    slots.retire(adapter("a"))  # harmless


def test_idle_adapter_that_is_retired_leaves_at_once() -> None:
    slots = make_slots()
    assert slots.hold(mix("a"))
    slots.release(mix("a"))
    slots.take_moves()
    slots.retire(adapter("a"))
    assert slots.num_free_pages == NUM_PAGES
    assert slots.take_moves() == ((adapter("a"),), ())


def test_books_balance_on_a_long_random_walk_and_the_moves_can_be_carried_out() -> None:
    """A mirror carries the moves out as the runner does: evictions, then uploads, within the pages there are."""
    generator = random.Random(3)
    slots = make_slots()
    held: list[AdapterMix] = []
    on_device: set[AdapterId] = set()
    num_refused = 0
    for _ in range(8000):
        action = generator.random()
        if held and action < 0.48:
            slots.release(held.pop(generator.randrange(len(held))))
        elif action < 0.95:
            wanted = mix(*generator.choices(list(PAGES), k=generator.choice([1, 1, 1, 2])))
            before = slots.resident, slots.num_free_pages
            if slots.hold(wanted):
                held.append(wanted)
            else:
                num_refused += 1
                assert (slots.resident, slots.num_free_pages) == before
        else:
            slots.retire(adapter(generator.choice(list(PAGES))))
        slots.check_integrity()
        holders = Counter(adapter_id for some in held for adapter_id, _ in some)
        assert set(holders) <= set(slots.resident)
        assert slots.num_held_pages == sum(PAGES[adapter_id.digest] for adapter_id in holders)
        if generator.random() < 0.5:
            evictions, uploads = slots.take_moves()
            for adapter_id in evictions:
                on_device.remove(adapter_id)
            for adapter_id in uploads:
                assert adapter_id not in on_device
                on_device.add(adapter_id)
            assert on_device == set(slots.resident)
            assert sum(PAGES[adapter_id.digest] for adapter_id in on_device) <= NUM_PAGES
    assert num_refused > 100
    assert adapter("whale") not in on_device
