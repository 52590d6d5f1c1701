"""Who comes into adapter memory, who leaves, who makes room: in simulated time, and for any traffic."""

import random
from itertools import count
from statistics import mean

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterd.core import AdapterMix, Sequence, SequenceState
from adapterd.engine.scheduler import SchedulerLimits
from tests.engine.simulated import Simulation, adapter, mix

PATIENCE, DRAIN = 1.0, 3.0
LIMITS = SchedulerLimits(256, 16, max_adapter_wait_seconds=PATIENCE, max_adapter_drain_seconds=DRAIN)
ONE_EACH = dict.fromkeys("abcdefgh", 1)


def simulate(num_pages: int = 2, limits: SchedulerLimits = LIMITS, **pages: int) -> Simulation:
    return Simulation(pages or ONE_EACH, num_pages, limits)


def bring(simulation: Simulation, *names: str) -> None:
    for name in names:
        simulation.scheduler.residency.prefetch(adapter(name))
    while not simulation.slots.is_ready(mix(*names)):
        simulation.step()


def resident(simulation: Simulation) -> set[str]:
    return {adapter_id.name for adapter_id in simulation.slots.resident}


def step_until(simulation: Simulation, sequence: Sequence, max_seconds: float) -> None:
    """Until it runs."""
    end = simulation.now + max_seconds
    while sequence.state is SequenceState.WAITING:
        assert simulation.now < end
        simulation.step()


# Who comes and who leaves


def test_longest_unused_leaves_first_among_those_that_nobody_waits_for() -> None:
    simulation = simulate(num_pages=3)
    for name in "abc":
        simulation.add(mix(name), 1)
        simulation.run_dry(5)
    simulation.add(mix("a"), 1)
    simulation.run_dry(5)
    simulation.add(mix("d"), 1)
    simulation.run_dry(5)
    assert resident(simulation) == {"a", "c", "d"}


def test_adapter_that_the_head_of_the_line_needs_is_not_evicted_for_one_behind_it() -> None:
    """Plain least-recently-used would take `a`, which is needed next, for `c`, which is needed last."""
    limits = SchedulerLimits(256, 1)
    simulation = simulate(num_pages=2, limits=limits)
    bring(simulation, "a", "b")
    simulation.add(mix("b"), 30)
    simulation.step()
    simulation.add(mix("a"), 4)
    simulation.add(mix("c"), 4)
    while simulation.scheduler.running:
        simulation.step()
        assert "a" in resident(simulation) or not simulation.scheduler.running
    simulation.run_dry(10)
    assert [i.name for batch in simulation.batches for i in batch.evictions] == ["b"]


def test_adapters_of_those_who_wait_are_uploaded_ahead_of_their_turn() -> None:
    simulation = simulate(num_pages=4, limits=SchedulerLimits(256, 4))
    for _ in range(4):
        simulation.add(mix("a"), 40)
    bring(simulation, "a")
    for name in "bcd":
        simulation.add(mix(name), 4)
    for _ in range(8):
        simulation.step()
    assert resident(simulation) == {"a", "b", "c", "d"}
    assert len(simulation.scheduler.waiting) == 3


def test_idle_adapters_stay_while_there_are_free_pages() -> None:
    simulation = simulate(num_pages=4)
    for name in "abcd":
        simulation.add(mix(name), 1)
        simulation.run_dry(5)
    assert resident(simulation) == {"a", "b", "c", "d"}
    assert simulation.slots.num_evictions == 0


def test_prefetch_takes_idle_pages_but_none_that_the_line_needs() -> None:
    simulation = simulate(num_pages=2, limits=SchedulerLimits(256, 1))
    bring(simulation, "a", "b")
    simulation.add(mix("a"), 30)
    simulation.step()
    waits = simulation.add(mix("b"), 4)
    simulation.scheduler.residency.prefetch(adapter("c"))
    step_until(simulation, waits, 5)
    assert "c" not in {i.name for batch in simulation.batches for i in batch.uploads}
    simulation.run_dry(5)
    simulation.scheduler.residency.prefetch(adapter("c"))
    simulation.step()
    assert simulation.slots.is_booked(mix("c"))


def test_prefetch_of_what_is_retired_in_the_same_step_brings_nothing() -> None:
    simulation = simulate(num_pages=2)
    simulation.scheduler.residency.prefetch(adapter("a"))
    simulation.scheduler.residency.retire(adapter("a"))
    bring(simulation, "b")
    # Nobody would ever retire it again: its pages would be lost until somebody needs them.
    assert resident(simulation) == {"b"}


# Who makes room


def test_waiting_for_room_stops_nobody_whose_adapter_is_there() -> None:
    simulation = simulate(num_pages=2)
    bring(simulation, "a", "b")
    for name in "ab":
        simulation.add(mix(name), 200)
    simulation.step()
    simulation.add(mix("c"), 4)
    for _ in range(10):
        others = [simulation.add(mix(), 2), simulation.add(mix("a"), 2)]
        simulation.step()
        assert all(other.state is SequenceState.RUNNING for other in others)


def test_adapter_that_will_soonest_be_done_takes_nobody_new_when_someone_has_waited_too_long() -> None:
    simulation = simulate(num_pages=2)
    bring(simulation, "a", "b")
    simulation.add(mix("a"), 60)
    simulation.add(mix("b"), 30)
    simulation.step()
    waits = simulation.add(mix("c"), 4)
    while simulation.now - simulation.added[waits.seed] <= PATIENCE + 0.1:
        simulation.step()
    of_a, of_b, of_base = (simulation.add(mix(*names), 4) for names in ("a", "b", ""))
    simulation.step()
    assert of_a.state is SequenceState.RUNNING
    assert of_base.state is SequenceState.RUNNING
    assert of_b.state is SequenceState.WAITING
    step_until(simulation, waits, 2.0)
    assert of_b.state is SequenceState.WAITING
    simulation.run_dry(10)
    assert simulation.scheduler.num_preemptions == 0


def test_who_is_not_done_in_time_is_set_back_and_comes_again_after_all_who_wait() -> None:
    simulation = simulate(num_pages=1)
    bring(simulation, "a")
    endless = simulation.add(mix("a"), 1000)
    simulation.step()
    waits = simulation.add(mix("c"), 20)
    behind = simulation.add(mix("d"), 20)
    step_until(simulation, waits, PATIENCE + DRAIN + 0.5)
    assert endless.num_preemptions == 1
    assert list(simulation.scheduler.waiting) == [behind, endless]
    simulation.run_dry(300)
    assert endless.num_output_tokens == 1000


def test_two_endless_answers_do_not_take_turns_before_a_third() -> None:
    """Regression: each came back right behind the one it had made room for, and so before everyone else for ever."""
    simulation = simulate(num_pages=1)
    bring(simulation, "a")
    for name in "ab":
        simulation.add(mix(name), 2000)
    third = simulation.add(mix("c"), 4)
    simulation.step()
    step_until(simulation, third, 3 * (PATIENCE + DRAIN + 1.0))


def test_nobody_behind_takes_the_pages_that_are_kept_for_someone_larger() -> None:
    """Regression of old: small adapters slipped into every gap, and the large one never found all its pages free."""
    simulation = simulate(num_pages=4, a=2, b=2, large=4, small=1)
    bring(simulation, "a", "b")
    for name, length in (("a", 30), ("b", 60)):
        simulation.add(mix(name), length)
    simulation.step()
    large = simulation.add(mix("large"), 4)
    while simulation.now - simulation.added[large.seed] <= PATIENCE + 0.1:
        simulation.step()
    small = simulation.add(mix("small"), 4)
    step_until(simulation, large, PATIENCE + DRAIN + 1.0)
    assert small.state is SequenceState.WAITING
    simulation.run_dry(10)


def test_pin_comes_before_all_others_and_never_leaves() -> None:
    simulation = simulate(num_pages=2)
    bring(simulation, "a", "b")
    for name in "ab":
        simulation.add(mix(name), 1000)
    simulation.step()
    simulation.add(mix("c"), 4)
    simulation.scheduler.residency.pin(adapter("p"))
    simulation.pages = {**ONE_EACH, "p": 1}
    while "p" not in resident(simulation):
        simulation.step()
        assert simulation.now < DRAIN + 1.0
        assert "c" not in resident(simulation)
    for _ in range(3):
        for name in "abcdefgh":
            simulation.add(mix(name), 4)
    simulation.run_dry(300)
    assert "p" in resident(simulation)
    assert sum(adapter("p") in batch.uploads for batch in simulation.batches) == 1


def test_line_that_pins_leave_no_room_is_refused_whole() -> None:
    simulation = simulate(num_pages=3, a=2, b=2)
    bring(simulation, "a")
    simulation.add(mix("a"), 40)
    simulation.step()
    waiting = [simulation.add(mix("b"), 4) for _ in range(3)]
    base = simulation.add(mix(), 4)
    simulation.scheduler.residency.pin(adapter("a"))
    simulation.step()
    assert simulation.scheduler.take_refused() == waiting
    assert simulation.scheduler.take_refused() == []
    assert base.state is SequenceState.RUNNING
    simulation.run_dry(10)


# For any traffic

ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 2),  # seconds after the one before
        st.lists(st.sampled_from("abcdefgh"), max_size=2, unique=True),
        st.integers(1, 120),  # tokens of the answer
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=30, deadline=None)
@given(
    arrivals=ARRIVALS,
    sizes=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    num_pages=st.integers(8, 12),
    pinned=st.sampled_from(["", "", "a"]),
    upload_seconds=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_everyone_is_served_within_a_bound_that_only_those_before_them_lengthen(
    arrivals: list[tuple[float, list[str], int]],
    sizes: list[int],
    num_pages: int,
    pinned: str,
    upload_seconds: float,
) -> None:
    """Whoever stands before may each take a turn of patience, drain and upload; whoever comes later takes none."""
    limits = SchedulerLimits(512, 64, max_adapter_wait_seconds=PATIENCE, max_adapter_drain_seconds=DRAIN)
    simulation = Simulation(dict(zip("abcdefgh", sizes, strict=True)), num_pages, limits)
    simulation.upload_seconds = upload_seconds
    if pinned:
        simulation.scheduler.residency.pin(adapter(pinned))
    num_before: list[int] = []
    due = 0.0
    for gap, names, length in arrivals:
        due += gap
        while simulation.now < due:
            simulation.step()
        num_before.append(len(simulation.scheduler.waiting))
        simulation.add(mix(*names), length)
    turn = PATIENCE + DRAIN + 2 * upload_seconds + 5 * simulation.step_seconds
    simulation.run_dry((len(arrivals) + 1) * (turn + 120 * simulation.step_seconds))
    refused = simulation.scheduler.take_refused()
    for sequence, before in zip(simulation.sequences, num_before, strict=True):
        if not any(sequence is other for other in refused):
            assert simulation.waited(sequence) <= (before + 1) * turn


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_cold_adapter_is_served_in_time_however_hot_the_others_are(data: st.DataObject) -> None:
    num_hot = data.draw(st.integers(1, 4))
    length = data.draw(st.sampled_from([5, 40, 1000]))
    simulation = simulate(num_pages=num_hot, limits=SchedulerLimits(512, 400, PATIENCE, DRAIN))
    hot = "abcd"[:num_hot]
    bring(simulation, *hot)
    cold: Sequence | None = None
    for number in count():
        simulation.add(mix(hot[number % num_hot]), length)  # one more in every step, for ever
        if number == 10:
            cold = simulation.add(mix("h"), 5)
        simulation.step()
        if cold is not None and cold.state is not SequenceState.WAITING:
            break
        assert number < 200
    assert cold is not None
    assert simulation.waited(cold) <= PATIENCE + DRAIN + simulation.upload_seconds + 0.3


def closed_loop(num_adapters: int, *, num_clients: int, num_slots: int = 8) -> Simulation:
    """Clients that each ask the next question, of an adapter drawn evenly, when the last is answered."""
    names = [f"adapter-{i}" for i in range(num_adapters)]
    limits = SchedulerLimits(2048, 16)
    simulation = Simulation(dict.fromkeys(names, 1), num_slots, limits)
    draw = random.Random(5)

    def ask(_: Sequence | None = None) -> None:
        if len(simulation.sequences) < 200:
            chosen: AdapterMix = mix(draw.choice(names))
            simulation.add(chosen, draw.randint(32, 96))

    simulation.on_finish = ask
    for _ in range(num_clients):
        ask()
    simulation.run_dry(1000)
    return simulation


def test_more_adapters_than_fit_are_a_slope_and_not_a_cliff() -> None:
    """Sequences a step, which is what throughput is made of, with memory for 8 adapters; and how long anyone waits."""

    def figures(num_adapters: int) -> tuple[float, float]:
        simulation = closed_loop(num_adapters, num_clients=32)
        rates = [len(batch.scheduled) for batch in simulation.batches]
        return mean(rates), max(simulation.waited(sequence) for sequence in simulation.sequences)

    full, _ = figures(8)
    for num_adapters, least in ((16, 0.9), (64, 0.55)):
        rate, longest_wait = figures(num_adapters)
        assert rate >= least * full
        assert longest_wait < 40
