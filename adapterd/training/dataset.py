"""The rows of one run: read, split, checked against each other and turned into tokens. No torch, no base's weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.data import (
    Example,
    dropped_rows,
    encode_rows,
    lines_sha256,
    read_rows,
    refuse_leaks,
    split_validation,
)
from adapterd.training.recipe import Recipe
from adapterd.training.tables import parse_columns


@dataclass(frozen=True)
class Dataset:
    """What is trained on, and what is held back to stop by.

    `digest` is that of all of it as tokens; `data_sha256` of the file, `held_back_sha256` of the lines held back.
    """

    training: list[Example]
    validation: list[Example]
    num_rows: int
    num_validation_rows: int
    data_sha256: str
    held_back_sha256: str
    digest: str

    @property
    def longest(self) -> int:
        return max(example.num_tokens for example in (*self.training, *self.validation))


def read_dataset(recipe: Recipe, renderer: Renderer, *, max_length: int) -> Dataset:
    """Raises InvalidRequest listing the lines that cannot be learnt, leaks into held-out rows, and empty sides.

    Raises ConfigError for a `--map` that names no columns.
    """
    columns = parse_columns(recipe.map)
    rows = read_rows(recipe.data, columns=columns)
    given = [] if recipe.validation is None else read_rows(recipe.validation, columns=columns)
    if recipe.heldout is not None:
        heldout = read_rows(recipe.heldout, columns=columns)
        refuse_leaks(rows, heldout, path=recipe.heldout)
        # The best step is chosen on the validation rows: what is held out from training is held out from that too.
        refuse_leaks(given, heldout, path=recipe.heldout, use="validated on", among="the validation rows")
    if recipe.validation is not None:
        validation_path, validation_rows = recipe.validation, given
        refuse_leaks(rows, validation_rows, path=validation_path)
    else:
        validation_path = recipe.data
        rows, validation_rows = split_validation(rows, fraction=recipe.validation_fraction, seed=recipe.seed)
    training, validation = (
        encode_rows(some, renderer, max_length=max_length, path=path, on_too_long=recipe.on_too_long)
        for some, path in ((rows, recipe.data), (validation_rows, validation_path))
    )
    for examples, path in ((training, recipe.data), (validation, validation_path)):
        if not any(example.answer_ids for example in examples):
            raise InvalidRequest(f"{path}: no token of it would be learnt", param="data")
    return Dataset(
        training=training,
        validation=validation,
        num_rows=len(rows) - len(dropped_rows(rows, training)),
        num_validation_rows=len(validation_rows) - len(dropped_rows(validation_rows, validation)),
        data_sha256=hashlib.sha256(recipe.data.read_bytes()).hexdigest(),
        held_back_sha256=lines_sha256(validation_rows),
        digest=_digest(training, validation),
    )


def _digest(*parts: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for examples in parts:
        tokens = [(example.prompt_ids, example.answer_ids) for example in examples]
        digest.update(json.dumps(tokens).encode())
    return digest.hexdigest()
