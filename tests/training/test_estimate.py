"""`estimate` counts what a real training then reports, and writes nothing."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest

from adapterd.cli import EXIT_ERROR, EXIT_USAGE, main
from adapterd.config import EstimateSettings, TrainSettings
from adapterd.render import Renderer
from adapterd.training.data import encode_rows, read_rows, split_validation
from adapterd.training.estimate import estimate
from adapterd.training.history import METRICS_FILE
from adapterd.training.train import train
from tests.training.runs import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, object]:
    """27 rows in 7 steps an epoch, of which the last is smaller; two epochs and a half, measured four times each."""
    return {
        "base": str(base),
        "data": write_rows(tmp_path / "train.jsonl", num_rows=34),
        "name": "support",
        "out": tmp_path / "out",
        "validation_fraction": 0.2,
        "rank": 4,
        "epochs": 2.5,
        "patience": 99,
        "evaluations_per_epoch": 4,
        "batch_size": 4,
        "device": "cpu",
    }


def estimate_settings(recipe: dict[str, object], **changes: object) -> EstimateSettings:
    return EstimateSettings.model_validate(recipe | {"probe_seconds": 0.01} | changes)


def test_tokens_and_evaluations_are_those_of_the_training_that_follows(
    recipe: dict[str, object], base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = estimate(estimate_settings(recipe))
    settings = TrainSettings.model_validate(recipe)
    with caplog.at_level(logging.INFO):
        directory = train(settings)
    reported = re.search(r"([\d,]+) tokens in", caplog.text)
    assert reported is not None
    assert found.trained_tokens == int(reported[1].replace(",", ""))

    with (directory / METRICS_FILE).open() as file:
        history = list(csv.DictReader(file))
    assert found.max_steps == len(history) - 1 == 18  # and the line of step 0
    _, held_back = split_validation(read_rows(settings.data), fraction=0.2, seed=settings.seed)
    examples = encode_rows(held_back, Renderer.load(base), max_length=256, path=settings.data)
    num_evaluations = sum(row["valid_loss"] != "" for row in history)
    assert found.evaluated_tokens == num_evaluations * sum(example.num_tokens for example in examples)
    assert (found.num_rows, found.num_validation_rows) == (34 - len(held_back), len(held_back))


def test_an_estimate_writes_nothing_and_asks_for_no_name(recipe: dict[str, object], tmp_path: Path) -> None:
    del recipe["name"]
    before = sorted(tmp_path.rglob("*"))
    estimate(estimate_settings(recipe))
    assert sorted(tmp_path.rglob("*")) == before


def test_time_follows_from_tokens_and_measured_speed_and_money_from_time(recipe: dict[str, object]) -> None:
    found = estimate(estimate_settings(recipe, price_per_hour=36.0))
    speed = found.measured
    computed = (
        found.trained_tokens / speed.tokens_per_second
        + found.evaluated_tokens / speed.evaluation_tokens_per_second
    )
    assert found.seconds > computed
    assert found.money == pytest.approx(found.seconds / 100)
    assert estimate(estimate_settings(recipe)).money is None


def test_epochs_are_by_rule_where_the_recipe_names_none(recipe: dict[str, object]) -> None:
    found = estimate(estimate_settings(recipe, epochs=None))
    assert (found.epochs, found.max_steps) == (10.0, 70)


def flags(recipe: dict[str, object]) -> list[str]:
    return [
        *("estimate", "--data", str(recipe["data"]), "--base", str(recipe["base"]), "--rank", "4"),
        *("--device", "cpu", "--probe-seconds", "0.01", "--epochs", "1", "--log-level", "error"),
    ]


def test_the_command_prints_lines_or_json(
    recipe: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(recipe), "--price-per-hour", "2"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["tokens", "time", "memory", "money"]
    assert "1 epochs, " in text
    assert main([*flags(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained_tokens"] > 0
    assert found["money"] is None
    assert found["measured"]["peak_bytes"] > 2**20
    assert found["measured"]["device"] == "cpu"


def test_a_recipe_can_be_estimated_as_it_stands(
    recipe: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'name = "support"\ndata = "train.jsonl"\nbase = "{recipe["base"]}"\nepochs = 2\nrank = 4\n'
    )
    assert main(["estimate", str(file), "--probe-seconds", "0.01", "--device", "cpu"]) == 0
    assert "2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [
        (["--data", "nowhere.jsonl"], EXIT_ERROR, "adapterd: nowhere.jsonl cannot be read"),
        (["--base", "nowhere"], EXIT_ERROR, "adapterd: "),
        (["--max-length", "3"], EXIT_ERROR, "adapterd: "),
        (["--price-per-hour", "-1"], EXIT_USAGE, "adapterd: --price-per-hour: '-1' should be greater"),
        (["--probe-seconds", "0"], EXIT_USAGE, "adapterd: --probe-seconds: '0' should be greater than 0"),
        (["--map", "prompt"], EXIT_USAGE, "adapterd: --map: 'prompt' is not one of prompt=COLUMN"),
    ],
)
def test_what_cannot_be_trained_cannot_be_estimated(
    recipe: dict[str, object], more: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(recipe), *more]) == code
    assert capsys.readouterr().err.startswith(line)
