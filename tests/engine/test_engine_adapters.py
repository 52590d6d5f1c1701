"""What the engine does about adapters: whose weights it holds, what comes, stays and leaves, and who is told."""

import time
from dataclasses import replace

import pytest

from adapterd.core import RequestId
from adapterd.engine.engine import Engine
from adapterd.engine.offline import collect
from adapterd.errors import AdapterRefused, Overloaded
from tests.engine.fake_runner import (
    PARAMS,
    FakeRunner,
    Mailbox,
    answers,
    make_engine,
    make_request,
    mix,
    until,
)


def test_mix_that_can_never_be_resident_is_refused_at_once(engine: Engine) -> None:
    """Regression: it was queued, waited for ever, and after a second nobody was admitted any more."""
    with pytest.raises(
        AdapterRefused, match=r"'a' and 'c' need 5\.0 MiB of adapter memory at once .* 4\.0 MiB"
    ):
        engine.submit(make_request("r", adapters=mix("a", "c")))
    engine.submit(make_request("r", adapters=mix("a", "b")))
    twice = tuple((adapter_id, factor) for adapter_id, _ in mix("c") for factor in (0.5, 0.7))
    engine.submit(make_request("s", adapters=twice))
    assert len(collect(engine)) == 2


def test_weights_are_held_from_submit_until_the_last_sequence_ends_however_it_ends(
    engine: Engine, runner: FakeRunner
) -> None:
    held = runner.weights.held
    for name in ("ends", "leaves early", "leaves late"):
        engine.submit(make_request(name, adapters=mix("a", "b"), num_sequences=2))
    with pytest.raises(AdapterRefused):
        engine.submit(make_request("refused", adapters=mix("a", "c")))
    assert set(held.values()) == {6, 0}
    engine.abort(RequestId("leaves early"))
    engine.step()
    assert set(held.values()) == {4, 0}
    engine.abort(RequestId("leaves late"))
    collect(engine)
    assert set(held.values()) == {0}


def test_adapter_whose_weights_nobody_holds_any_more_makes_room_for_another(engine: Engine) -> None:
    """Regression: its size was asked of weights that might have gone from host memory long ago."""
    for name in "abca":
        engine.submit(make_request(name, adapters=mix(name)))
        assert len(collect(engine)) == 1
    assert engine.stats().num_evictions == 3


def test_retired_adapter_leaves_when_its_last_sequence_ends(engine: Engine) -> None:
    (old, _), (idle, _) = mix("a", "b")
    engine.submit(make_request("other", adapters=mix("b"), params=replace(PARAMS, max_tokens=1)))
    engine.submit(make_request("r", adapters=mix("a")))
    engine.step()
    engine.step()
    assert set(engine.stats().resident) == {old, idle}
    engine.retire(old)
    engine.retire(idle)
    engine.step()
    assert engine.stats().resident == (old,)
    collect(engine)
    stats = engine.stats()
    assert (stats.resident, stats.adapter_bytes_resident) == ((), 0)
    engine.step()
    engine.check_integrity()


def test_idle_engine_carries_out_an_eviction_without_being_asked_for_work(
    engine: Engine, runner: FakeRunner
) -> None:
    engine.submit(make_request("r", adapters=mix("a")))
    collect(engine)
    engine.retire(mix("a")[0][0])
    assert engine.has_work()
    engine.step()
    assert [adapter_id.name for batch in runner.batches for adapter_id in batch.evictions] == ["a"]


def test_step_that_can_compute_nothing_waits_for_the_upload_and_not_longer(
    engine: Engine, runner: FakeRunner
) -> None:
    runner.uploads_by_hand = True
    mailbox = Mailbox()
    engine.start(mailbox)
    engine.submit(make_request("r", adapters=mix("a")))
    until(lambda: engine.stats().num_uploading == 1)
    before = len(runner.batches)
    time.sleep(0.2)
    assert len(runner.batches) - before < 10  # it does not spin
    runner.tell(mix("a")[0][0], None)
    mailbox.wait_for_end("r")
    until(lambda: engine.stats().adapter_bytes_held == 0)


def test_others_go_on_while_an_adapter_is_on_its_way(engine: Engine, runner: FakeRunner) -> None:
    runner.uploads_by_hand = True
    engine.submit(make_request("waits", adapters=mix("a")))
    engine.submit(make_request("runs"))
    for _ in range(5):
        engine.step()
    assert engine.stats().num_running == 0
    assert engine.stats().num_waiting == 1
    runner.tell(mix("a")[0][0], None)
    assert len(answers(engine, "waits")[0]) == 5


def test_upload_that_fails_ends_who_waited_for_it_and_nobody_else(engine: Engine, runner: FakeRunner) -> None:
    runner.uploads_by_hand = True
    for name, adapters in (("lost", mix("a")), ("lost too", mix("a", "b")), ("other", mix("b"))):
        engine.submit(make_request(name, adapters=adapters))
    engine.step()
    runner.tell(mix("a")[0][0], "no such matrix")
    runner.tell(mix("b")[0][0], None)
    outputs = engine.step()
    refused = {output.request_id: output for output in outputs if output.error is not None}
    assert set(refused) == {"lost", "lost too"}
    assert refused[RequestId("lost")].error == "the adapter 'a' could not be uploaded: no such matrix"
    assert len(collect(engine)[RequestId("other"), 0].token_ids) == 4
    assert set(runner.weights.held.values()) == {0}
    engine.check_integrity()
    runner.uploads_by_hand = False
    engine.submit(make_request("again", adapters=mix("a")))
    assert len(answers(engine, "again")[0]) == 5


def test_who_pinned_is_told_of_an_upload_that_fails_and_nobody_else_is(runner: FakeRunner) -> None:
    told: list[tuple[str, str]] = []
    engine = make_engine(
        runner, on_pin_failed=lambda adapter_id, error: told.append((adapter_id.name, error))
    )
    runner.uploads_by_hand = True
    engine.pin(mix("a")[0][0])
    engine.prefetch(mix("b")[0][0])
    engine.step()
    for name in ("a", "b"):
        runner.tell(mix(name)[0][0], "no such matrix")
    engine.step()
    assert told == [("a", "no such matrix")]
    assert engine.stats().pinned == engine.stats().resident == ()
    engine.submit(make_request("r", adapters=mix("c")))
    engine.check_integrity()


def test_pinned_adapter_comes_without_a_request_and_stays(engine: Engine, runner: FakeRunner) -> None:
    ((pinned, _),) = mix("a")
    engine.start(Mailbox())
    engine.pin(pinned)
    engine.pin(pinned)
    until(lambda: pinned in engine.stats().resident)
    assert engine.stats().pinned == (pinned,)
    engine.prefetch(mix("b")[0][0])
    until(lambda: mix("b")[0][0] in engine.stats().resident)
    until(lambda: set(runner.weights.held.values()) == {0})
    engine.unpin(pinned)
    until(lambda: engine.stats().pinned == ())
    mailbox = Mailbox()
    engine.submit(make_request("r", adapters=mix("c")))
    engine.stop()
    assert mailbox.deliveries == []


def test_request_that_pinned_adapters_leave_no_room_is_told_to_come_back_later(engine: Engine) -> None:
    engine.pin(mix("a")[0][0])
    with pytest.raises(
        Overloaded, match=r"no adapter memory for 'c': 3\.0 MiB .* take 2\.0 MiB of 4\.0 MiB"
    ) as found:
        engine.submit(make_request("r", adapters=mix("c")))
    assert found.value.retry_after_seconds == 10
    with pytest.raises(Overloaded, match="'c'"):
        engine.pin(mix("c")[0][0])
    with pytest.raises(Overloaded, match="'c'"):
        engine.prefetch(mix("c")[0][0])
    engine.submit(make_request("beside", adapters=mix("a", "b")))
    engine.submit(make_request("base"))
    assert len(collect(engine)) == 2
    engine.unpin(mix("a")[0][0])
    engine.submit(make_request("r", adapters=mix("c")))
    assert len(collect(engine)) == 1


def test_request_that_waits_while_its_room_is_pinned_away_is_told_so_and_not_left_hanging(
    engine: Engine, runner: FakeRunner
) -> None:
    engine.submit(make_request("runs", adapters=mix("b"), params=replace(PARAMS, max_tokens=20)))
    for _ in range(3):
        engine.step()
    engine.submit(make_request("waits", adapters=mix("c")))
    engine.step()
    engine.pin(mix("a")[0][0])
    found = collect(engine)
    assert found[RequestId("waits"), 0].finish_reason == "overloaded"
    assert len(found[RequestId("runs"), 0].token_ids) == 17
    assert engine.stats().resident[-1] == mix("a")[0][0]
    assert set(runner.weights.held.values()) == {0}


def test_retired_version_is_no_longer_pinned(engine: Engine) -> None:
    ((old, _),) = mix("a")
    engine.pin(old)
    collect(engine)
    engine.retire(old)
    engine.submit(make_request("r", adapters=mix("c")))
    collect(engine)
    assert engine.stats().pinned == ()
    assert old not in engine.stats().resident
