"""What a training would take, before it runs: tokens by counting them, time and memory from a few seconds of it.

Nothing is written. All numbers are the most: early stopping ends most runs sooner.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapterd.model.base_config import exact_context, read_config
from adapterd.model.find import find_base
from adapterd.render import Renderer
from adapterd.training.batches import epoch_batches
from adapterd.training.data import Example
from adapterd.training.dataset import read_dataset
from adapterd.training.measure import Measured, measure_training
from adapterd.training.plan import Steps
from adapterd.training.recipe import Recipe

_NUM_LOADS = 2
"""The base is loaded to be trained on, and once more for the round trip."""


class EstimateRequest(Recipe, Protocol):
    """A recipe, and how to look at it; `config.EstimateSettings` is the real thing."""

    @property
    def price_per_hour(self) -> float | None: ...
    @property
    def probe_seconds(self) -> float: ...
    @property
    def json_(self) -> bool: ...


@dataclass(frozen=True)
class Estimate:
    """Tokens are those of whole rows, prompts included, padding not; `trained_tokens` over all epochs.

    `seconds` is from the command to the published adapter; `money` is in whatever the price was given in.
    """

    num_rows: int
    num_validation_rows: int
    epochs: float
    max_steps: int
    trained_tokens: int
    evaluated_tokens: int
    seconds: float
    money: float | None
    measured: Measured

    def as_text(self) -> str:
        found = self.measured
        lines = [
            f"{self.num_rows} rows and {self.num_validation_rows} held back;"
            f" {self.epochs:g} epochs, {self.max_steps} steps at most",
            f"tokens  {self.trained_tokens:,} to train on, {self.evaluated_tokens:,} to evaluate",
            f"time    {_duration(self.seconds)} at {found.tokens_per_second:,.0f} tokens/s,"
            f" measured on {found.device} in {found.dtype}; less if it stops early",
            f"memory  {found.peak_bytes / 2**20:,.0f} MiB;"
            f" {found.num_trainable:,} parameters beside the base's {found.num_base_parameters:,}",
        ]
        if self.money is not None:
            lines.append(f"money   {self.money:.2f}")
        return "\n".join(lines)

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def estimate(request: EstimateRequest) -> Estimate:
    """Read the rows as training does, train for `probe_seconds`, and reckon. Raises what training would of both."""
    began = time.perf_counter()
    base = find_base(request.base)
    renderer = Renderer.load(base)
    context = exact_context(read_config(base, request.base), request.max_length, flag="--max-length")
    dataset = read_dataset(request, renderer, max_length=context)
    reading_seconds = time.perf_counter() - began

    measured = measure_training(request, renderer, dataset.training, max_seconds=request.probe_seconds)
    steps = Steps.of(request, dataset)
    trained = _trained_tokens(request, dataset.training, steps)
    evaluated = steps.max_evaluations * _num_tokens(dataset.validation)
    seconds = (
        reading_seconds
        + _NUM_LOADS * measured.load_seconds
        + trained / measured.tokens_per_second
        + evaluated / measured.evaluation_tokens_per_second
    )
    return Estimate(
        num_rows=dataset.num_rows,
        num_validation_rows=dataset.num_validation_rows,
        epochs=steps.epochs,
        max_steps=steps.max_steps,
        trained_tokens=trained,
        evaluated_tokens=evaluated,
        seconds=seconds,
        money=None if request.price_per_hour is None else request.price_per_hour * seconds / 3600,
        measured=measured,
    )


def _trained_tokens(recipe: Recipe, examples: Sequence[Example], steps: Steps) -> int:
    """Of all steps. The last epoch may end within: then its batches are known from the seed."""
    whole, left = divmod(steps.max_steps, steps.steps_per_epoch)
    batches = epoch_batches(examples, batch_size=recipe.batch_size, seed=recipe.seed, epoch=whole)
    return whole * _num_tokens(examples) + sum(_num_tokens(batch) for batch in batches[:left])


def _num_tokens(examples: Sequence[Example]) -> int:
    return sum(example.num_tokens for example in examples)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
