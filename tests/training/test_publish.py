"""Where an adapter is published, when, and what was proven before."""

import csv
import json
import logging
import shlex
import time
from pathlib import Path

import pytest

from adapterd.cli import main
from adapterd.config import EngineSettings, TrainSettings, load_settings
from adapterd.daemon import Daemon
from adapterd.errors import InvalidRequest
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.training.card import CARD_FILE, RESULTS_BEGIN, RESULTS_END
from adapterd.training.curve import CURVE_FILE
from adapterd.training.data import read_rows
from adapterd.training.errors import RoundTripFailed
from adapterd.training.history import METRICS_FILE
from adapterd.training.recipe import output_directory
from adapterd.training.train import train
from tests.training.runs import but, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_trained_in_place_beside_its_recipe(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "support"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    recipe = (
        f'name = "support"\nbase = "{base}"\ndata = "train.jsonl"\nrank = 4\nepochs = 0.4\nbatch_size = 4\n'
    )
    (folder / "recipe.toml").write_text(recipe)
    settings = load_settings(TrainSettings, {}, {}, folder / "recipe.toml")
    written = sorted([CARD_FILE, CONFIG_FILE, CURVE_FILE, WEIGHTS_FILE, SEAL_FILE, METRICS_FILE])
    assert train(settings) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted([*written, "recipe.toml", "train.jsonl"])
    (folder / CARD_FILE).write_text("by hand")
    train(settings)
    assert (folder / CARD_FILE).read_text() == "by hand"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["support"]


def test_what_training_says_to_measure_with_measures_the_rows_that_it_held_back(
    told: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "tickets.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "reply"])
        writer.writerows([row.prompt_text, row.answer] for row in read_rows(told.data))
    mapped = but(told, epochs=0.4, data=table, map=("prompt=question", "completion=reply"))
    with caplog.at_level(logging.INFO):
        directory = train(mapped)
    (command,) = [found for m in caplog.messages if (found := m.removeprefix("measure it: ")) != m]
    cheap = ["--device", "cpu", "--samples", "0", "--max-tokens", "32", "--shots", "1", "--write-card"]
    out = tmp_path / "report.json"
    assert main([*shlex.split(command)[1:], *cheap, "--json-out", str(out)]) == 0
    (report,) = json.loads(out.read_text())
    seal = json.loads((directory / SEAL_FILE).read_text())
    assert report["num_rows"] == seal["num_validation_rows"]
    assert any("held back from training" in note for note in report["notes"])
    assert "held-out rows of `tickets.csv`" in (directory / CARD_FILE).read_text()


def test_folder_of_the_result(told: TrainSettings, tmp_path: Path) -> None:
    assert output_directory(told) == tmp_path / "out" / "support"
    beside = but(told, out=None)
    assert output_directory(beside) == Path("adapters/support")
    assert output_directory(but(beside, name=tmp_path.name)) == tmp_path


def test_published_by_one_rename_and_found_by_the_registry(
    told: TrainSettings, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = train(but(told, epochs=0.4))
    assert first == out / "support"
    digest_folder = first.readlink()
    assert digest_folder.parts[:2] == (".versions", "support")

    settings = EngineSettings.model_validate({"base": str(base), "adapters": (out,), "device": "cpu"})
    daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        assert daemon.registry.wait_loaded(30)
        before = daemon.registry.resolve("base:support").digest
        assert digest_folder.name == before
        train(but(told, epochs=0.4, seed=2))
        deadline = time.monotonic() + 30
        while daemon.registry.resolve_waiting("base:support", 30).digest == before:
            assert time.monotonic() < deadline, "the running registry did not pick up the new version"
            time.sleep(0.05)
        assert daemon.registry.resolve_waiting("base:support", 30).digest == first.readlink().name
    finally:
        daemon.registry.stop()
    assert sorted(path.name for path in out.iterdir()) == [".versions", "support"]
    assert len(list((out / ".versions" / "support").iterdir())) == 2


def test_a_folder_of_somebody_elses_is_refused_before_any_work(told: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "out" / "support").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="is a folder or file of its own"):
        train(told)


def test_round_trip_is_proven_and_kept(told: TrainSettings) -> None:
    directory = train(told)
    proof = json.loads((directory / SEAL_FILE).read_text())["round_trip"]
    assert proof["num_rows"] == 5
    assert proof["largest_difference"] < 1e-4
    assert proof["largest_effect"] > 0.01
    assert proof["served_loss"] == pytest.approx(proof["trained_loss"], abs=1e-4)
    card = (directory / CARD_FILE).read_text()
    assert "largest difference of a log probability" in card
    assert card.count(RESULTS_BEGIN) == card.count(RESULTS_END) == 1
    assert f"![loss by step]({CURVE_FILE})" in card


def test_an_adapter_without_effect_is_not_published(told: TrainSettings) -> None:
    with pytest.raises(RoundTripFailed, match="changes nothing"):
        train(but(told, learning_rate=1e-30, epochs=0.4))
    assert told.out is not None
    assert not (told.out / "support").exists()
