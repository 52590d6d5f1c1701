"""The rows that training held back, found again: for who has one file of rows and no other.

Training keeps no copy of them. It writes down the file's hash, how it was split, and a hash of the lines held back. A
split is a function of rows, fraction and seed, but also of the version that makes it: the hash says if it is the same.
Adapters of versions that wrote none are taken at their word.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterd.errors import ConfigError
from adapterd.file_names import SEAL_FILE
from adapterd.training.data import Row, lines_sha256, split_validation

NOTE = (
    "These rows were held back from training, which chose its best step by them: the adapter looks a little better"
    " than on rows that nobody has used."
)


def find_held_back(folder: Path, data: Path, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of `data` that the adapter in `folder` was trained on, and those that were held back.

    Raises ConfigError if the adapter does not say how it was made, was made from other rows, or if training held back
    others of them than are found now.
    """
    way_out = "name held-out rows with --data"
    seal = _read_seal(folder / SEAL_FILE)
    split = seal.get("split")
    if not isinstance(split, dict) or not {"fraction", "seed"} <= split.keys():
        raise ConfigError(
            f"{folder} has no heldout.jsonl, and its {SEAL_FILE} does not say which rows were held back; {way_out}",
            param="data",
        )
    if seal.get("data_sha256") != hashlib.sha256(data.read_bytes()).hexdigest():
        raise ConfigError(
            f"{folder} has no heldout.jsonl, and {data} is not the file that it was trained on, so what was held back"
            f" is not known; {way_out}",
            param="data",
        )
    trained, held_back = split_validation(rows, fraction=float(split["fraction"]), seed=int(split["seed"]))
    if split.get("lines_sha256", lines_sha256(held_back)) != lines_sha256(held_back):
        raise ConfigError(
            f"{folder} has no heldout.jsonl, and its training held back other rows of {data} than are found now (by"
            f" another version of adapterd, or with another --map), so some of these were trained on; {way_out}",
            param="data",
        )
    return trained, held_back


def _read_seal(path: Path) -> dict[str, Any]:
    try:
        seal = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return seal if isinstance(seal, dict) else {}
