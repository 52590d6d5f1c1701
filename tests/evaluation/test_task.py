from pathlib import Path

import pytest

from adapterd.config import EvalSettings
from adapterd.errors import ConfigError, InvalidRequest
from adapterd.evaluation.task import read_general, read_task
from adapterd.render import Renderer
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


def test_general_texts_are_paragraphs(tmp_path: Path) -> None:
    assert len(read_general(None)) > 20
    path = tmp_path / "own.txt"
    path.write_text("One.\r\n\r\n\r\nTwo\r\nlines.\r\n")
    assert read_general(path) == ["One.", "Two\nlines."]
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="holds no text"):
        read_general(path)
