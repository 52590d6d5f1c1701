"""`check`, `estimate` and `train` mean the same by the longest row that a base takes: where it is exact."""

import json
from pathlib import Path

import pytest

from adapterd.cli import EXIT_ERROR, main
from tests.exactness.families import FAMILIES
from tests.tiny import byte_level_tokenizer
from tests.training.runs import write_rows


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, list[str]]:
    """Each command on the same 24 rows, for a base of 256 positions that is exact up to its RoPE's switch at 64.

    It has no weights: what is asked here is answered before they are loaded.
    """
    base = tmp_path / "base"
    FAMILIES["phi3-longrope"]().save_pretrained(base)
    byte_level_tokenizer().save_pretrained(base)
    rows = str(write_rows(tmp_path / "train.jsonl"))
    return {
        "check": ["check", rows, "--base", str(base)],
        "estimate": ["estimate", "--data", rows, "--base", str(base)],
        "train": [
            "train",
            "--data",
            rows,
            "--base",
            str(base),
            "--name",
            "x",
            "--out",
            str(tmp_path / "out"),
        ],
    }


@pytest.mark.parametrize("command", ["check", "estimate", "train"])
def test_a_longer_row_than_the_base_is_exact_for_cannot_be_allowed(
    command: str, asked: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked[command], "--max-length", "65"]) == EXIT_ERROR
    assert "--max-length 65 exceeds the base's 64 tokens (longrope RoPE switches" in capsys.readouterr().err


def test_what_check_calls_too_long_is_what_training_refuses(
    asked: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "long " * 40}, {"role": "assistant", "content": "x"}]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    assert main(asked["check"]) == EXIT_ERROR
    assert "1 row with more than the 64 tokens of the context" in capsys.readouterr().out
    for command in ("estimate", "train"):
        assert main(asked[command]) == EXIT_ERROR
        assert "train.jsonl:25: " in capsys.readouterr().err
