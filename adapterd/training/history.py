"""What a run has measured, step by step: OpenAI's result file, and TensorBoard if asked for."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterd.errors import ConfigError

METRICS_FILE = "training.csv"
_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class StepRecord:
    """One step: mean loss in nats and share of first-ranked tokens, of its own rows and of the validation rows."""

    step: int
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None

    def values(self) -> tuple[float | None, ...]:
        return self.train_loss, self.train_accuracy, self.valid_loss, self.valid_accuracy


def as_csv(history: Sequence[StepRecord]) -> str:
    """OpenAI's columns of a fine-tuning result file."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_HEADER)
    for record in history:
        writer.writerow(
            [record.step, *("" if value is None else f"{value:.6f}" for value in record.values())]
        )
    return file.getvalue()


class TensorBoardLog:
    """The same figures as TensorBoard's events; nothing at all if `directory` is None."""

    def __init__(self, directory: Path | None, *, first_step: int) -> None:
        """`first_step`: what an earlier run wrote of it and of later steps is to be forgotten."""
        self._writer: Any = None
        if directory is not None:
            check_tensorboard(directory)
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def add(self, record: StepRecord, learning_rate: float) -> None:
        if self._writer is None:
            return
        named = zip(
            ("train/loss", "train/accuracy", "valid/loss", "valid/accuracy"), record.values(), strict=True
        )
        for name, value in (*named, ("learning_rate", learning_rate)):
            if value is not None:
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard(directory: Path | None) -> None:
    """Raise ConfigError if logs are asked for and nothing here can write them."""
    if directory is not None and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "--tensorboard needs the package tensorboardX: pip install 'adapterd[tensorboard]'",
            param="tensorboard",
        )
