import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from adapterd.config import EvalSettings
from adapterd.errors import ConfigError, InvalidRequest
from adapterd.evaluation.held_back import NOTE
from adapterd.evaluation.task import read_general, read_task
from adapterd.file_names import SEAL_FILE
from adapterd.render import Renderer
from adapterd.training.data import lines_sha256, read_rows, split_validation
from tests.evaluation.folders import row, write_rows
from tests.tiny import byte_level_tokenizer

RENDERER = Renderer(byte_level_tokenizer(), eos_token_ids=frozenset({2}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "heldout.jsonl", [row(f"q{i}", label) for i, label in enumerate(["a", "b"] * 4)])
    write_rows(tmp_path / "train.jsonl", [row(f"t{i}", "a") for i in range(3)])
    return tmp_path


def test_a_folder_alone_is_enough(folder: Path) -> None:
    task = read_task(folder, EvalSettings(), RENDERER)
    assert (len(task.rows), len(task.train), task.metric, task.system) == (8, 3, "label_accuracy", None)
    assert task.num_leaked == 0


def test_the_folders_file_says_more_and_a_flag_wins(folder: Path) -> None:
    (folder / "eval.toml").write_text(
        'system_prompt = "Say a or b."\nshots = 3\nmax_tokens = 9\ntrain = "t.jsonl"\n'
    )
    write_rows(folder / "t.jsonl", [row("only", "a")])
    task = read_task(folder, EvalSettings(), RENDERER)
    assert (task.system, task.num_shots, task.max_tokens, len(task.train)) == ("Say a or b.", 3, 9, 1)
    task = read_task(folder, EvalSettings(shots=1, limit=2), RENDERER)
    assert (task.num_shots, task.max_tokens, len(task.rows)) == (1, 9, 2)


def test_a_key_that_is_none_is_refused(folder: Path) -> None:
    (folder / "eval.toml").write_text("shot = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'shot' in .*eval.toml; did you mean shots"):
        read_task(folder, EvalSettings(), RENDERER)


def test_columns_of_a_table_are_named_as_in_training(folder: Path) -> None:
    (folder / "rows.csv").write_text("Ticket,Reply\nq1,a\nq2,b\n")
    names = ("prompt=Ticket", "completion=Reply")
    task = read_task(folder, EvalSettings(data=folder / "rows.csv", map=names), RENDERER)
    assert [(row.prompt_text, row.answer) for row in task.rows] == [("q1", "a"), ("q2", "b")]
    assert len(task.train) == 3  # chat rows need no names
    with pytest.raises(InvalidRequest, match="no column 'prompt'"):
        read_task(folder, EvalSettings(data=folder / "rows.csv"), RENDERER)


def test_without_held_out_rows_those_are_asked_that_training_held_back(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    data = write_rows(tmp_path / "rows.jsonl", [row(f"{i} is what number?", "ab"[i % 2]) for i in range(30)])
    told = EvalSettings(train=data)
    with pytest.raises(
        ConfigError, match=r"does not say which rows were held back; name held-out rows with --data"
    ):
        read_task(mine, told, RENDERER)
    seal: dict[str, Any] = {
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "split": {"fraction": 0.2, "seed": 3},
    }
    (mine / SEAL_FILE).write_text(json.dumps(seal))
    task = read_task(mine, told, RENDERER)
    _, held_back = split_validation(read_rows(data), fraction=0.2, seed=3)
    assert [row.line for row in task.rows] == [row.line for row in held_back]
    assert {row.line for row in task.train}.isdisjoint(row.line for row in held_back)
    assert (task.num_leaked, task.notes) == (0, (NOTE,))
    lines = lines_sha256(held_back)
    (mine / SEAL_FILE).write_text(json.dumps({**seal, "split": {**seal["split"], "lines_sha256": lines}}))
    assert read_task(mine, told, RENDERER).rows == task.rows
    (mine / SEAL_FILE).write_text(
        json.dumps({**seal, "split": {**seal["split"], "lines_sha256": lines[::-1]}})
    )
    with pytest.raises(ConfigError, match=r"held back other rows of .*rows.jsonl than are found now"):
        read_task(mine, told, RENDERER)
    data.write_text(data.read_text() + "\n")
    with pytest.raises(ConfigError, match="not the file that it was trained on"):
        read_task(mine, told, RENDERER)
    assert read_task(folder, told, RENDERER).notes == ()  # a heldout.jsonl is better


def test_a_prompt_that_an_earlier_turn_trains_counts_as_leaked(folder: Path) -> None:
    long = {"messages": [*row("q3", "a")["messages"], *row("and now?", "b")["messages"]]}  # type: ignore[misc]
    write_rows(folder / "train.jsonl", [row("t", "a"), long])
    assert read_task(folder, EvalSettings(), RENDERER).num_leaked == 1


def test_a_system_prompt_comes_from_one_place(folder: Path) -> None:
    (folder / "p.txt").write_text("Be short.\n")
    assert (
        read_task(folder, EvalSettings(system_prompt_file=folder / "p.txt"), RENDERER).system == "Be short."
    )
    with pytest.raises(ConfigError, match="give one"):
        read_task(folder, EvalSettings(system_prompt="x", system_prompt_file=folder / "p.txt"), RENDERER)
    with pytest.raises(ConfigError, match="cannot read"):
        read_task(folder, EvalSettings(system_prompt_file=folder / "none.txt"), RENDERER)


def test_a_reference_that_is_itself_not_valid_is_refused_by_line(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"heldout.jsonl:2: the reference answer 'b'"):
        read_task(folder, EvalSettings(format_regex=("a",)), RENDERER)


def test_references_that_nobody_could_give_in_so_few_tokens_are_refused_by_line(folder: Path) -> None:
    long = "what takes more than eight tokens"
    data = write_rows(folder / "long.jsonl", [row("q1", "a"), row("q2", long), row("q3", long[:-6])])
    needed = len(RENDERER.encode_answer(long)) + 1  # and the stop token
    with pytest.raises(InvalidRequest) as refusal:
        read_task(folder, EvalSettings(data=data, max_tokens=8), RENDERER)
    (second, third) = refusal.value.message.splitlines()
    assert second.startswith(
        f"{data}:2: the reference answer takes {needed} tokens and --max-tokens allows 8;"
    )
    assert third.startswith(f"{data}:3: ")
    assert third.endswith(f"--max-tokens {needed} is enough for all")
    assert len(read_task(folder, EvalSettings(data=data, max_tokens=needed), RENDERER).rows) == 3


def test_general_texts_are_paragraphs(tmp_path: Path) -> None:
    assert len(read_general(None)) > 20
    path = tmp_path / "own.txt"
    path.write_text("One.\r\n\r\n\r\nTwo\r\nlines.\r\n")
    assert read_general(path) == ["One.", "Two\nlines."]
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="holds no text"):
        read_general(path)
