"""A tiny base, and a recipe for it that every test may change."""

from pathlib import Path

import pytest

from adapterd.config import TrainSettings
from tests.tiny import tiny_llama
from tests.training.runs import write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)
    return directory


@pytest.fixture
def told(base: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "base": str(base),
            "data": write_rows(tmp_path / "train.jsonl"),
            "name": "support",
            "out": tmp_path / "out",
            "validation_fraction": 0.2,
            "rank": 4,
            "epochs": 2.0,
            "learning_rate": 1e-2,
            "warmup_fraction": 0.0,
            "decay_fraction": 1.0,
            "batch_size": 4,
            "seed": 1,
            "device": "cpu",
        }
    )
