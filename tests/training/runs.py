"""What the tests of training train on, and what they read of a run."""

import csv
import json
from pathlib import Path

from adapterd.config import TrainSettings
from adapterd.training.history import METRICS_FILE

WORDS = ["parcel", "money", "order", "today", "please", "fine", "charged", "back"]
LABELS = ["Shipping", "Refund", "Billing", "Other"]


def write_rows(path: Path, num_rows: int = 24, first: int = 0) -> Path:
    with path.open("w") as file:
        for i in range(first, first + num_rows):
            question = f"{i}: {WORDS[i % 8]} {WORDS[(i * 3 + 1) % 8]}"
            answer = f"Category: {LABELS[i % 4]}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def but(settings: TrainSettings, **changes: object) -> TrainSettings:
    return TrainSettings.model_validate(settings.model_dump() | changes)


def history(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS_FILE).open() as file:
        return list(csv.DictReader(file))
