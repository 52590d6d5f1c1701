"""The load/unload storm: what it would notice, and a short one against the real daemon."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bench.load_storm import main, missing_refusals, unbalanced
from bench.storm_threads import CHANGES, Asked, Outcome, ask, wrong_answer, wrong_outcome

REFERENCES = {"one": [1, 2, 3], "two": [4, 5, 6]}
NO_ROOM = "no adapter memory for 'a': 1.0 MiB are needed, and pinned adapters take 2.0 MiB of 2.0 MiB"
RIGHT = Asked("a", status=200, digest="two", token_ids=[4, 5, 6], seconds=1.0)


@pytest.mark.parametrize("may_be_gone", [False, True])
@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (RIGHT, None),
        (replace(RIGHT, is_cut=True, token_ids=[4]), None),
        (replace(RIGHT, token_ids=[4, 5]), r"\[4, 5\] is not"),
        (replace(RIGHT, token_ids=[1, 2, 3]), r"\[1, 2, 3\] is not"),
        (replace(RIGHT, is_cut=True, token_ids=[1]), r"\[1\] is not"),
        (replace(RIGHT, digest="three"), "which it never was"),
        (replace(RIGHT, error="the stream was cut off"), "in the stream: the stream was cut off"),
        (replace(RIGHT, seconds=61.0), "took 61"),
        (Asked("a", status=503, error="later"), "HTTP 503: later"),
        (Asked("a", status=400, error="what?"), "HTTP 400: what?"),
        (Asked("a", status=0, error="ReadTimeout"), "HTTP 0: ReadTimeout"),
    ],
)
def test_an_answer_must_be_one_versions_whole_and_in_time(
    asked: Asked, complaint: str | None, may_be_gone: bool
) -> None:
    said = wrong_answer(asked, REFERENCES, 60.0, may_be_gone=may_be_gone)
    if complaint is None:
        assert said is None
    else:
        with pytest.raises(AssertionError, match=complaint):
            raise AssertionError(said)


@pytest.mark.parametrize(
    ("headers", "body", "complaint"),
    [
        ({"x-adapterd-digest": "two"}, "data: {what\n\ndata: [DONE]\n\n", "no JSON: {what"),
        ({}, "data: [DONE]\n\n", "no version, which it never was"),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_wrong_one(
    headers: dict[str, str], body: str, complaint: str
) -> None:
    answer = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, text=body))
    with httpx.Client(base_url="http://server", transport=answer) as client:
        asked = ask(client, "a", [1], 3, cut=False)
    assert complaint in (wrong_answer(asked, REFERENCES, 60.0, may_be_gone=False) or "")


@pytest.mark.parametrize(
    ("status", "error", "retry_after"),
    [(404, "not here", None), (409, "not here", None), (429, NO_ROOM, "10")],
)
def test_only_what_comes_and_goes_may_be_missing(status: int, error: str, retry_after: str | None) -> None:
    asked = Asked("a", status=status, error=error, retry_after=retry_after)
    assert wrong_answer(asked, REFERENCES, 60.0, may_be_gone=True) is None
    assert wrong_answer(asked, REFERENCES, 60.0, may_be_gone=False) == f"a: HTTP {status}: {error}"


@pytest.mark.parametrize(
    ("text", "retry_after", "complaint"),
    [
        (NO_ROOM, "10", None),
        (NO_ROOM, None, "Retry-After None"),
        (NO_ROOM, "0", "Retry-After 0"),
        (NO_ROOM, "soon", "Retry-After soon"),
        ("the queue is full", "1", "for another reason than pins: the queue is full"),
    ],
)
def test_no_room_is_said_with_its_reason_and_when_to_come_back(
    text: str, retry_after: str | None, complaint: str | None
) -> None:
    asked = Asked("a", status=429, error=text, retry_after=retry_after)
    said = (
        wrong_answer(asked, REFERENCES, 60.0, may_be_gone=True),
        wrong_outcome(Outcome("pin", "a", 429, text, 1.0, retry_after), 60.0),
    )
    assert said == (None, None) if complaint is None else all(complaint in (one or "") for one in said)


def test_a_storm_in_which_nobody_was_refused_has_shown_too_little() -> None:
    refused, done = Outcome("pin", "a", 429, NO_ROOM, 1.0, "10"), Outcome("pin", "a", 200, "", 1.0)
    asked = Asked("a", status=429, error=NO_ROOM, retry_after="10")
    assert missing_refusals([done, refused], [RIGHT, asked]) == []
    assert len(missing_refusals([done], [asked])) == len(missing_refusals([refused], [RIGHT])) == 1


@pytest.mark.parametrize(
    ("status", "text", "seconds", "is_wrong"),
    [
        (200, "", 1.0, False),
        (404, "", 1.0, False),
        (400, "The lora adapter 'a' has already been loaded.", 1.0, False),
        (400, "'lora_path' must be provided", 1.0, True),
        (500, "", 1.0, True),
        (503, "", 1.0, True),
        (0, "ReadTimeout", 1.0, True),
        (200, "", 61.0, True),
    ],
)
def test_an_operation_must_be_done_or_refused_in_time(
    status: int, text: str, seconds: float, is_wrong: bool
) -> None:
    assert (wrong_outcome(Outcome("load", "a", status, text, seconds), 60.0) is not None) == is_wrong


def test_what_is_not_given_back_is_named() -> None:
    before = {"host_adapter_bytes": 10.0, "running": 0.0}
    assert unbalanced(before, dict(before)) == []
    assert unbalanced(before, before | {"running": 1.0}) == ["running: 0 before and 1 after"]


def test_a_short_storm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "storm.json"
    size = ["--threads", "4", "--operations", "30", "--names", "2"]
    status = main([*size, "--seed", "1", "--out", str(out)])
    captured = capsys.readouterr()
    assert out.exists(), captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert (status, result["wrong"]) == (0, [])
    assert result["operations"].keys() <= CHANGES.keys()
    assert sum(sum(counts.values()) for counts in result["operations"].values()) == 4 * 30 + 2 * 2
    assert result["answers_of_the_steady"] > 4
    assert result["answers_of_the_touched"]["200"] > 0
    assert min(result["refused_for_room"].values()) > 0
    assert result["after"] == result["before"]
