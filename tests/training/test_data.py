import json
import random
from pathlib import Path
from typing import Any

import pytest

from adapterd.errors import ConfigError, InvalidRequest
from adapterd.render import Renderer
from adapterd.training.data import (
    dropped_rows,
    encode_rows,
    refuse_leaks,
    split_validation,
)
from adapterd.training.rows import Row, fold, fold_turns, read_rows, scan_rows
from adapterd.training.tables import parse_columns
from tests.tiny import byte_level_tokenizer

USER = {"role": "user", "content": "Where is my parcel?"}
ANSWER = {"role": "assistant", "content": "Category: Shipping"}
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]


def calling(arguments: str, *, times: int = 1) -> dict[str, Any]:
    function = {"name": "track", "arguments": arguments}
    calls = [{"id": f"call_{i + 1}", "type": "function", "function": function} for i in range(times)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


CALL = calling('{"order": "12345"}')
TWICE = calling("{}", times=2)
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "on its way"}
PATH = Path("train.jsonl")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(byte_level_tokenizer(), eos_token_ids=frozenset({2}))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def row(question: str, line: int = 1) -> Row:
    return Row(line, ({"role": "user", "content": question}, ANSWER), (False, True), ())


def test_rows_are_read_with_their_line_and_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "f", chat(USER, ANSWER), "", chat(USER, ANSWER, tags=["edge"]))
    assert [(r.line, r.tags, r.answer) for r in read_rows(path)] == [
        (1, (), "Category: Shipping"),
        (3, ("edge",), "Category: Shipping"),
    ]


def test_text_parts_are_one_text(tmp_path: Path) -> None:
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": "it?"}],
    }
    (r,) = read_rows(write(tmp_path / "f", chat(parts, ANSWER)))
    assert r.prompt[0]["content"] == "Where is\nit?"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "no JSON"),
        ("[" * 20_000, "no JSON"),
        ('{"messages": NaN}', "NaN is not JSON"),
        ('{"messages": [], "messages": []}', "'messages' stands twice"),
        ("[]", "Line 2 is not a dictionary"),
        ({"answer": "a"}, "neither 'messages' nor 'prompt'"),
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "'text' is not supported"),
        ({"conversations": []}, "ShareGPT"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca"),
        ({"input": {}, "preferred_output": []}, "DPO"),
        (chat(USER, ANSWER, functions=[]), "'functions' is not supported"),
        (chat(USER, ANSWER, tags="edge"), "no list of strings"),
        (chat(), "nothing to learn"),
        (chat(USER), "last message is not the assistant's"),
        (chat(ANSWER), "nothing stands before it"),
        (chat(USER, {"role": "bot", "content": "x"}), "role 'bot'.*perhaps 'assistant'"),
        (chat(USER, {**ANSWER, "weight": 0}), "weight 0"),
        (chat(USER, {**ANSWER, "weight": 2}), "'weight' is 0 or 1"),
        (chat({**USER, "weight": 1}, ANSWER), "'weight' is 0 or 1"),
        (chat({**USER, "content": " \n"}, ANSWER), "message 0: content is empty"),
        (chat(USER, {**ANSWER, "content": None}), "message 1: content is empty"),
        (chat(USER, {**ANSWER, "content": [{"type": "image_url"}]}), "part that is no text"),
        (chat(USER, {**ANSWER, "reasoning_content": "hm"}), "'reasoning_content' is not supported.*<think>"),
        (chat("user", ANSWER), "message 0 is no object"),
        (chat({**USER, "tool_call_id": "a"}, ANSWER), "'tool_call_id' stands on every tool message"),
        (chat(USER, CALL), "calls 'track', and the row's tools are none"),
        (chat(USER, CALL, ANSWER, tools=TOOLS), "'call_1' has not been answered"),
        (chat(USER, CALL, {**RESULT, "tool_call_id": "x"}, ANSWER, tools=TOOLS), "'x', which nobody made"),
        (chat(USER, {**CALL, "tool_calls": [{"id": "a"}]}, tools=TOOLS), "no function with a name"),
        (chat(USER, calling("[1]"), tools=TOOLS), "'arguments' is no JSON object"),
        (chat(USER, ANSWER, tools=[{"name": "track"}]), "tool 0 is no function"),
        (chat(USER, ANSWER, tools="track"), "'tools' is no list"),
        (chat(USER, TWICE, tools=TOOLS, parallel_tool_calls=False), "2 calls at once"),
    ],
)
def test_bad_rows_are_named_with_their_line(bad: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f", chat(USER, ANSWER), bad, chat(USER, ANSWER))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        read_rows(path)
    assert refusal.value.message.startswith(f"{path}:2: ")


def test_all_that_is_wrong_with_a_row_is_found_at_once(tmp_path: Path) -> None:
    bad = chat({**USER, "role": "human"}, {**ANSWER, "weight": 3}, USER, mood="bad")
    assert {problem.code for problem in scan_rows(write(tmp_path / "f", bad)).problems} == {
        "key",
        "role",
        "weight",
    }


def test_null_is_absent_as_in_requests(tmp_path: Path) -> None:
    exported = {**ANSWER, "refusal": None, "tool_calls": None, "function_call": None}
    (r,) = read_rows(write(tmp_path / "f", chat(USER, exported, tools=None)))
    assert r.messages[1] == ANSWER


def test_developer_is_the_system_and_a_name_is_kept(tmp_path: Path) -> None:
    (r,) = read_rows(
        write(
            tmp_path / "f",
            chat({"role": "developer", "content": "Be kind."}, {**USER, "name": "ann"}, ANSWER),
        )
    )
    assert r.messages[0]["role"] == "system"
    assert r.messages[1]["name"] == "ann"


def test_prompt_and_completion_become_messages(tmp_path: Path) -> None:
    conversational = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    first, second = read_rows(
        write(tmp_path / "f", {"prompt": "a", "completion": "b", "system": "c"}, conversational)
    )
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant"]
    assert second.trained == (False, False, False, True)


def test_columns_are_named_where_they_are_called_something_else(tmp_path: Path) -> None:
    columns = parse_columns(["prompt=instruction", "completion=output"])
    file = scan_rows(write(tmp_path / "f", {"instruction": "a", "output": "b", "id": 7}), columns=columns)
    assert file.rows[0].answer == "b"
    assert file.unused == {"id"}
    with pytest.raises(ConfigError, match="'answer=x' is not one of"):
        parse_columns(["answer=x"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_rows_are_read_with_the_line_they_begin_on(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    lines = ["prompt", "completion"], ['"two\nlines"', "a"], ["b", '"c""d"']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(delimiter.join(line) for line in lines).encode())
    assert [(r.line, r.prompt_text, r.answer) for r in read_rows(path)] == [
        (2, "two\nlines", "a"),
        (4, "b", 'c"d'),
    ]


def test_csv_without_its_columns_or_with_stray_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("ticket,reply\na,b\n")
    with pytest.raises(InvalidRequest, match=r"no column 'prompt'; the header has 'ticket', 'reply'.*--map"):
        read_rows(path)
    path.write_text('prompt,completion\na,b\nc,d,e\nf,"g\n')
    with pytest.raises(InvalidRequest) as refusal:
        read_rows(path)
    assert f"{path}:3: 3 fields where the header has 2" in refusal.value.message
    assert f"{path}:4: no CSV from here on" in refusal.value.message


def test_every_bad_line_is_listed_but_not_endlessly(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_rows(write(tmp_path / "f", *["{"] * 25))
    lines = refusal.value.message.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 5 more lines"


def test_missing_empty_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="no rows"):
        read_rows(write(tmp_path / "empty"))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_rows(tmp_path / "latin")


def test_example_is_the_servers_prompt_and_the_answer_with_its_stop_token(renderer: Renderer) -> None:
    (example,) = encode_rows([row("Where is it?")], renderer, max_length=256, path=PATH)
    assert list(example.prompt_ids) == renderer.render([{"role": "user", "content": "Where is it?"}])
    assert renderer.decode(example.answer_ids, skip_special_tokens=False) == "Category: Shipping<|im_end|>"
    assert example.answer_ids[-1] == renderer.stop_token_id


def test_each_trained_turn_is_an_example_that_sees_the_turns_before_it(
    renderer: Renderer, tmp_path: Path
) -> None:
    system = {"role": "system", "content": "Be brief."}
    untrained = {"role": "assistant", "content": "Yes?", "weight": 0}
    (r,) = read_rows(write(tmp_path / "f", chat(system, USER, ANSWER, USER, untrained, USER, ANSWER)))
    first, second = encode_rows([r], renderer, max_length=256, path=PATH)
    assert list(first.prompt_ids) == renderer.render(r.messages[:2])
    assert list(second.prompt_ids) == renderer.render(r.messages[:6])
    assert "Yes?" in renderer.decode(second.prompt_ids)


def test_row_that_is_too_long_is_refused_and_never_cut(renderer: Renderer) -> None:
    long = [row("Where?", 1), row("Where is it? " * 40, 7)]
    with pytest.raises(InvalidRequest, match=r"train\.jsonl:7: \d+ tokens are more than the 60 allowed"):
        encode_rows(long, renderer, max_length=60, path=PATH)


def test_row_that_is_too_long_is_dropped_only_if_told_and_never_in_silence(
    renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row("Where?", 1), row("Where is it? " * 40, 7)]
    kept = encode_rows(rows, renderer, max_length=60, path=PATH, on_too_long="drop")
    assert [example.line for example in kept] == [1]
    assert dropped_rows(rows, kept) == [7]
    assert "1 of 2 rows need more than 60 tokens and are left out: lines 7" in caplog.text
    with pytest.raises(InvalidRequest, match="every row is longer"):
        encode_rows(rows[1:], renderer, max_length=60, path=PATH, on_too_long="drop")


def test_special_token_that_a_row_spells_out_is_letters_as_in_serving(renderer: Renderer) -> None:
    asked = {"role": "user", "content": "a<|im_end|>b"}
    answered = {"role": "assistant", "content": "I see <|im_end|> there."}
    (example,) = encode_rows(
        [Row(1, (asked, answered), (False, True), ())], renderer, max_length=256, path=PATH
    )
    assert list(example.prompt_ids) == renderer.render([asked])
    assert example.answer_ids.count(renderer.stop_token_id) == 1
    assert renderer.decode(example.answer_ids) == "I see <|im_end|> there."


def test_split_is_whole_deterministic_and_keeps_copies_together() -> None:
    rows = [
        row(f"Question {i % 40 * 12345679}" if i % 3 else f"  QUESTION   {i % 40 * 12345679}", i)
        for i in range(100)
    ]
    training, validation = split_validation(rows, fraction=0.2, seed=3)
    assert sorted(r.line for r in training + validation) == list(range(100))
    assert not {fold(r) for r in training} & {fold(r) for r in validation}
    assert 20 <= len(validation) <= 23
    assert split_validation(rows, fraction=0.2, seed=3) == (training, validation)
    assert split_validation(rows, fraction=0.2, seed=4) != (training, validation)


def test_near_duplicates_stay_on_one_side_of_the_split() -> None:
    rng = random.Random(0)
    words = ["parcel", "invoice", "lamp", "street", "refund", "password", "garden", "phone", "late", "blue"]
    questions = [f"{i} " + " ".join(rng.choices(words, k=12)) for i in range(60)]
    variants = [f"{question}{end}" for question in questions for end in ("", "!", ", please.")]
    rows = [row(question, line) for line, question in enumerate(variants)]
    training, validation = split_validation(rows, fraction=0.1, seed=0)
    assert 15 <= len(validation) <= 22
    assert not {r.line // 3 for r in training} & {r.line // 3 for r in validation}


def test_a_large_group_of_copies_does_not_become_the_validation_set() -> None:
    rows = [row("Where is my parcel" + "!" * i, i) for i in range(80)] + [
        row(f"{i} or {i * i}?", 80 + i) for i in range(20)
    ]
    for seed in range(10):
        _, validation = split_validation(rows, fraction=0.1, seed=seed)
        assert 1 <= len(validation) <= 13


def test_split_never_leaves_a_side_empty() -> None:
    training, validation = split_validation([row("a"), row("b")], fraction=0.99, seed=0)
    assert len(training) == len(validation) == 1
    with pytest.raises(InvalidRequest, match="fewer than two"):
        split_validation([row("a"), row(" A ")], fraction=0.5, seed=0)


def test_heldout_prompt_that_is_trained_on_is_refused() -> None:
    refuse_leaks([row("a")], [row("b")], path=Path("heldout.jsonl"))
    with pytest.raises(InvalidRequest, match=r"heldout\.jsonl:5: the same prompt is trained on, in line 2"):
        refuse_leaks([row("Where is it?", 2)], [row("where  is it?", 5)], path=Path("heldout.jsonl"))


def conversation(line: int, *questions: str) -> Row:
    messages = [m for question in questions for m in ({"role": "user", "content": question}, ANSWER)]
    return Row(line, tuple(messages), tuple(message is ANSWER for message in messages), ())


def test_heldout_prompt_that_an_earlier_turn_is_trained_on_is_refused() -> None:
    heldout = Path("heldout.jsonl")
    with pytest.raises(InvalidRequest, match=r"heldout\.jsonl:5: the same prompt is trained on, in line 2"):
        refuse_leaks([conversation(2, "a", "b")], [row("A", 5)], path=heldout)
    refuse_leaks([row("a", 2)], [conversation(5, "a", "b")], path=heldout)  # of which b is asked
    untrained = Row(2, conversation(2, "a", "b").messages, (False, False, False, True), ())
    refuse_leaks([untrained], [row("a", 5)], path=heldout)


def test_a_conversation_unrolled_turn_by_turn_stays_on_one_side() -> None:
    rng = random.Random(1)
    words = [f"{a}{b}" for a in ("ka", "mo", "ri", "tu", "sol") for b in ("do", "ra", "mel", "fan", "bri")]
    chats = [[" ".join(rng.choices(words, k=8)) for _ in range(3)] for _ in range(40)]
    rows = [
        conversation(3 * number + length, *turns[:length])
        for number, turns in enumerate(chats)
        for length in (1, 2, 3)
    ]
    training, validation = split_validation(rows, fraction=0.2, seed=0)
    assert 20 <= len(validation) <= 30
    assert not {(r.line - 1) // 3 for r in training} & {(r.line - 1) // 3 for r in validation}
    trained = {prompt for r in training for prompt in fold_turns(r)}
    assert not trained & {prompt for r in validation for prompt in fold_turns(r)}


def test_a_greeting_that_most_conversations_begin_with_does_not_tie_them_together(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [conversation(i, "Hi", f"{i * 12345679} or {i * i * 7919}?") for i in range(100)]
    rows += [row(f"{i * 104729}: what is that?", 100 + i) for i in range(3)]
    training, validation = split_validation(rows, fraction=0.2, seed=0)
    assert 15 <= len(validation) <= 25
    assert len(training) + len(validation) == 103
    assert "too many conversations share a turn" in caplog.text
