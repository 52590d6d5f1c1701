"""Peers and the judge, over HTTP as they come, from a server that knows its answers by heart."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapterd.config import EvalSettings
from adapterd.errors import ConfigError, Unavailable
from adapterd.evaluation.arms import Prompting
from adapterd.evaluation.remote import Endpoint, Judge, ask_peer
from adapterd.evaluation.scoring import Answer
from adapterd.training.data import Row
from tests.evaluation.folders import evaluate_and_write, make_folders

Chat = list[dict[str, str]]


class FakeChat:
    """/v1/chat/completions of models that are functions of the last message. `seen` keeps what was asked."""

    def __init__(self, models: dict[str, Callable[[Chat], str | int]]) -> None:
        self.seen: list[dict[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.seen.append(body | {"key": self.headers["Authorization"]})
                said = models[body["model"]](body["messages"])
                status, answer = (
                    (said, {"error": {"message": "broken"}})
                    if isinstance(said, int)
                    else (200, _answer(said))
                )
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def grade(chat: Chat) -> str:
    """Right if the expert's answer and the one to grade are the same lines."""
    _, _, rest = chat[-1]["content"].partition("Expert's answer:\n")
    reference, _, rest = rest.partition("\n\nAnswer to grade:\n")
    answer, _, _ = rest.partition("\n\nDoes it")
    if answer == "unclear":
        return "I cannot say."
    return "It does.\n**GRADE: C**" if answer == reference else "GRADE: C would be wrong.\nGRADE: I"


@pytest.fixture
def chat() -> Iterator[FakeChat]:
    fake = FakeChat({"good": lambda chat: "A: 1\nB: 2", "judge": grade, "broken": lambda chat: 400})
    yield fake
    fake.close()


def rows(number: int) -> list[Row]:
    messages = ({"role": "user", "content": "q {answer}"}, {"role": "assistant", "content": "A: 1\nB: 2"})
    return [Row(line, messages, (False, True), ()) for line in range(1, number + 1)]


def test_a_peer_is_asked_every_row_and_costs_by_its_own_count(chat: FakeChat) -> None:
    asked = rows(20)
    prompting = Prompting("Be brief.")
    answers, cost = ask_peer(
        Endpoint(chat.url, "good", None),
        asked,
        [row.answer for row in asked],
        [prompting.messages(row) for row in asked],
        max_tokens=7,
        price_in=2.0,
        price_out=10.0,
    )
    assert [answer.text for answer in answers] == ["A: 1\nB: 2"] * 20
    assert len(chat.seen) == 20
    assert chat.seen[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (chat.seen[0]["temperature"], chat.seen[0]["max_tokens"]) == (0, 7)
    assert (cost.num_prompt_tokens, cost.num_answer_tokens, cost.seconds) == (600, 80, None)
    assert cost.money == pytest.approx((600 * 2 + 80 * 10) / 1e6)
    assert cost.latency_seconds > 0


def test_the_key_comes_from_the_variable_that_is_named(
    chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    Endpoint(chat.url, "good", "SOME_KEY").ask(({"role": "user", "content": "x"},), max_tokens=1)
    assert chat.seen[0]["key"] == "Bearer secret"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="SOME_KEY holds no key"):
        Endpoint(chat.url, "good", "SOME_KEY")


def test_a_peer_that_fails_is_named(chat: FakeChat) -> None:
    with pytest.raises(Unavailable, match=r"broken at http://127.0.0.1:\d+/v1 did not answer"):
        Endpoint(chat.url, "broken", None).ask(({"role": "user", "content": "x"},), max_tokens=1)


def test_the_judge_grades_equal_answers_once_and_says_where_it_gave_none(chat: FakeChat) -> None:
    judge = Judge(Endpoint(chat.url, "judge", None))
    answers = [
        Answer("q", "A: 1", text, num_tokens=1, stopped=True, tags=())
        for text in ("A: 1", "{reference}", "A: 1", "unclear")
    ]
    assert judge.grade(answers) == [1, 0, 1, None]
    assert len(chat.seen) == 3
    assert judge.grade(answers) == [1, 0, 1, None]
    assert len(chat.seen) == 3


def test_peer_and_judge_stand_in_the_report(chat: FakeChat, tmp_path: Path) -> None:
    make_folders(tmp_path)
    out = tmp_path / "report.json"
    settings = EvalSettings(
        base=str(tmp_path / "base"),
        adapters=(tmp_path / "adapters" / "one",),
        adapter_memory=8 << 20,
        max_tokens=12,
        samples=0,
        shots=0,
        peer_url=chat.url,
        peer_model=("good",),
        peer_price_in=1.0,
        price_per_hour=3.6,
        judge_url=chat.url,
        judge_model="judge",
        json_out=out,
    )
    text = evaluate_and_write(settings).report
    (result,) = json.loads(out.read_text())
    assert result["arms"]["peer:good"]["scores"]["exact"]["value"] == 1
    assert result["arms"]["peer:good"]["scores"]["judge"]["value"] == 1
    assert result["arms"]["adapter"]["scores"]["judge"]["value"] == 0
    assert result["against"]["peer:good"]["value"] == -1
    assert "`good` is better than the adapter: -100.0 points" in text
    assert "| money for 1,000 rows |" in text
    seconds = result["arms"]["base"]["cost"]["seconds"]
    assert result["arms"]["base"]["cost"]["money"] == pytest.approx(seconds / 1000)
    assert "The judge is `judge`" in text
