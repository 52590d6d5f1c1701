import json
from pathlib import Path
from typing import Any

import pytest

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.data import Row, encode_rows, fold, read_rows, refuse_leaks, split_validation
from tests.tiny import byte_level_tokenizer

USER = {"role": "user", "content": "Where is my parcel?"}
ANSWER = {"role": "assistant", "content": "Category: Shipping"}
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
        "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}],
    }
    (r,) = read_rows(write(tmp_path / "f", chat(parts, ANSWER)))
    assert r.prompt[0]["content"] == "Where is it?"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "no JSON"),
        ("[" * 20_000, "no JSON"),
        ("[]", "list 'messages'"),
        ({"prompt": "a"}, "list 'messages'"),
        (chat(USER, ANSWER, tools=[]), "'tools' is not supported"),
        (chat(USER, ANSWER, tags="edge"), "no list of strings"),
        (chat(), "nothing to learn"),
        (chat(USER), "last message is not the assistant's"),
        (chat(ANSWER), "do not alternate"),
        (chat(USER, USER, ANSWER), "do not alternate"),
        (chat(USER, {"role": "system", "content": "x"}, ANSWER), "do not alternate"),
        (chat(USER, {"role": "tool", "content": "x"}, ANSWER), "role 'tool'"),
        (chat(USER, {**ANSWER, "weight": 0}), "weight 0"),
        (chat(USER, {**ANSWER, "weight": 2}), "'weight' is 0 or 1"),
        (chat({**USER, "weight": 1}, ANSWER), "'weight' is 0 or 1"),
        (chat({**USER, "content": " \n"}, ANSWER), "message 0: content is empty"),
        (chat(USER, {**ANSWER, "content": None}), "message 1: content is empty"),
        (chat(USER, {**ANSWER, "content": [{"type": "image_url"}]}), "part that is no text"),
        (chat(USER, {**ANSWER, "tool_calls": []}), "'tool_calls' is not supported"),
        (chat("user", ANSWER), "message 0 is no object"),
    ],
)
def test_bad_rows_are_named_with_their_line(bad: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f", chat(USER, ANSWER), bad, chat(USER, ANSWER))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        read_rows(path)
    assert refusal.value.message.startswith(f"{path}:2: ")


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
    rows = [row(f"Question {i % 40}" if i % 3 else f"  QUESTION   {i % 40}", i) for i in range(100)]
    training, validation = split_validation(rows, fraction=0.2, seed=3)
    assert sorted(r.line for r in training + validation) == list(range(100))
    assert not {fold(r) for r in training} & {fold(r) for r in validation}
    assert 20 <= len(validation) <= 23
    assert split_validation(rows, fraction=0.2, seed=3) == (training, validation)
    assert split_validation(rows, fraction=0.2, seed=4) != (training, validation)


def test_split_never_leaves_a_side_empty() -> None:
    training, validation = split_validation([row("a"), row("b")], fraction=0.99, seed=0)
    assert len(training) == len(validation) == 1
    with pytest.raises(InvalidRequest, match="fewer than two"):
        split_validation([row("a"), row(" A ")], fraction=0.5, seed=0)


def test_heldout_prompt_that_is_trained_on_is_refused() -> None:
    refuse_leaks([row("a")], [row("b")], path=Path("heldout.jsonl"))
    with pytest.raises(InvalidRequest, match=r"heldout\.jsonl:5: the same prompt is trained on, in line 2"):
        refuse_leaks([row("Where is it?", 2)], [row("where  is it?", 5)], path=Path("heldout.jsonl"))
