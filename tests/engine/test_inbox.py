"""What is asked of the engine is taken or refused at once, and done in its order."""

import threading
import time

import pytest

from adapterd.core import AdapterDigest, AdapterId, AdapterMix, Request, RequestId, SamplingParams, alone
from adapterd.engine.checks import RequestChecks
from adapterd.engine.inbox import Inbox
from adapterd.engine.seams import EngineMemory
from adapterd.errors import InvalidRequest, Overloaded, Unavailable

A, B = (AdapterId(AdapterDigest(letter * 64), letter) for letter in "ab")


class Weights:
    """Every mix that is held, once for each time."""

    def __init__(self) -> None:
        self.held: list[AdapterMix] = []

    def hold(self, mix: AdapterMix) -> None:
        self.held.append(mix)

    def release(self, mix: AdapterMix) -> None:
        self.held.remove(mix)

    def num_pages(self, adapter_id: AdapterId) -> int:
        assert alone(adapter_id) in self.held
        return 2


@pytest.fixture
def weights() -> Weights:
    return Weights()


@pytest.fixture
def inbox(weights: Weights) -> Inbox:
    """Of an engine that runs two sequences, with a queue of one, and with adapter memory for one adapter."""
    memory = EngineMemory(8, 4, num_adapter_pages=3, adapter_page_bytes=1 << 20)
    return Inbox(
        RequestChecks(memory, weights, vocab_size=9, max_model_len=32), weights, max_queue=1, max_num_seqs=2
    )


def request(mix: AdapterMix = (), *, num_sequences: int = 1) -> Request:
    return Request(RequestId("r"), (1, 2), SamplingParams(max_tokens=4), mix, frozenset(), 0.0, num_sequences)


def nothing() -> None:
    pass


def test_what_was_asked_is_taken_once_in_its_order(inbox: Inbox) -> None:
    done: list[str] = []
    inbox.post(lambda: done.append("first"))
    inbox.submit(request(num_sequences=2), lambda: done.append("second"))
    assert not inbox.is_empty
    wishes, num_submitted = inbox.take()
    for wish in wishes:
        wish()
    assert (done, num_submitted, inbox.is_empty) == (["first", "second"], 2, True)


def test_a_submission_counts_until_the_engine_says_who_waits(inbox: Inbox) -> None:
    inbox.submit(request(num_sequences=3), nothing)
    _, num_taken = inbox.take()
    with pytest.raises(Overloaded, match="3 sequences are waiting and the queue holds 1"):
        inbox.submit(request(), nothing)
    inbox.seen(0, 2, num_taken=num_taken)
    inbox.submit(request(), nothing)
    with pytest.raises(Overloaded):
        inbox.submit(request(), nothing)


def test_those_that_could_start_do_not_count_as_waiting(inbox: Inbox) -> None:
    """Regression: an idle engine refused for ever what was more than its queue."""
    inbox.submit(request(num_sequences=3), nothing)
    _, num_taken = inbox.take()
    inbox.seen(1, 1, num_taken=num_taken)
    inbox.submit(request(), nothing)
    with pytest.raises(Overloaded):
        inbox.submit(request(), nothing)


def test_more_answers_than_may_ever_be_here_are_an_error_of_the_request(inbox: Inbox) -> None:
    with pytest.raises(InvalidRequest, match="4 answers are asked for and at most 3 may") as found:
        inbox.submit(request(num_sequences=4), nothing)
    assert found.value.param == "n"


def test_only_what_is_taken_has_its_weights_held(inbox: Inbox, weights: Weights) -> None:
    inbox.submit(request(alone(A), num_sequences=2), nothing)
    inbox.bring(A, nothing, pinned=True)
    assert weights.held == [alone(A)] * 3
    for refused in (
        lambda: inbox.submit(request(alone(B)), nothing),
        lambda: inbox.bring(B, nothing, pinned=False),
        lambda: inbox.submit(request(alone(A), num_sequences=2), nothing),
    ):
        with pytest.raises(Overloaded):
            refused()
    assert weights.held == [alone(A)] * 3
    inbox.unpin(A)
    inbox.bring(B, nothing, pinned=False)
    assert weights.held == [alone(A)] * 3 + [alone(B)]


@pytest.mark.parametrize("pinned", [True, False])
def test_one_that_stops_takes_no_requests_and_brings_nothing_and_says_if_it_failed(
    inbox: Inbox, weights: Weights, pinned: bool
) -> None:
    """Regression: a dead engine agreed to keep adapters, and their weights were held for ever."""
    asked = (
        lambda: inbox.submit(request(alone(A)), nothing),
        lambda: inbox.bring(A, nothing, pinned=pinned),
    )
    for end, reason in ((inbox.stop, "is stopping"), (lambda: inbox.fail("a bug"), "has stopped: a bug")):
        end()
        for ask in asked:
            with pytest.raises(Unavailable, match=reason):
                ask()
    assert weights.held == []
    inbox.post(nothing)
    assert len(inbox.take()[0]) == 1


def test_who_waits_is_woken_by_a_wish_and_by_the_end_and_not_put_to_sleep_after_them(inbox: Inbox) -> None:
    began = time.monotonic()
    for ask in (lambda: inbox.post(nothing), inbox.stop):
        waiting = threading.Thread(target=inbox.wait, args=(60.0,))
        waiting.start()
        ask()
        waiting.join()
        inbox.wait(60.0)
        inbox.take()
    assert time.monotonic() - began < 30
    assert inbox.is_stopping
