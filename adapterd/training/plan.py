"""What a recipe comes to on this base and these rows: rates and steps, and what makes a run the same run."""

import logging
import math
from dataclasses import dataclass

from adapterd.training.dataset import Dataset
from adapterd.training.network import Network
from adapterd.training.recipe import Recipe
from adapterd.training.rules import epochs_for, learning_rate_for, num_steps_for, steps_per_epoch


@dataclass(frozen=True)
class Steps:
    """How often the rows are seen. `max_steps` is the most; the schedule may end sooner."""

    epochs: float
    steps_per_epoch: int
    max_steps: int
    steps_per_evaluation: int

    @classmethod
    def of(cls, recipe: Recipe, dataset: Dataset) -> "Steps":
        epochs = recipe.epochs or epochs_for(dataset.num_rows)
        per_epoch = steps_per_epoch(len(dataset.training), recipe.batch_size)
        return cls(
            epochs=epochs,
            steps_per_epoch=per_epoch,
            max_steps=num_steps_for(len(dataset.training), recipe.batch_size, epochs),
            steps_per_evaluation=max(1, round(per_epoch / recipe.evaluations_per_epoch)),
        )

    @property
    def max_evaluations(self) -> int:
        """Before the first step, at each interval, and after the last step."""
        return 1 + math.ceil(self.max_steps / self.steps_per_evaluation)


@dataclass(frozen=True)
class Plan(Steps):
    """The numbers that nobody has to give, settled."""

    learning_rate: float
    num_warmup: int

    def identity(self, recipe: Recipe, network: Network, dataset: Dataset) -> dict[str, str]:
        """Everything that the weights after a step depend on, by name. Two runs that agree on it are one run."""
        values = {
            "base": network.fingerprint,
            "data": dataset.data_sha256,
            "rows as tokens": dataset.digest,
            "rank": network.config.r,
            "scale": network.scale,
            "linears": sorted(network.spec.lora_targets),
            "use_dora": recipe.use_dora,
            "warm_start": None if recipe.warm_start is None else network.start_digest,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "warmup_fraction": recipe.warmup_fraction,
            "decay_fraction": recipe.decay_fraction,
            "weight_decay": recipe.weight_decay,
            "batch_size": recipe.batch_size,
            "micro_batch_tokens": recipe.micro_batch_tokens,
            "packed": network.packed,
            "quantization": recipe.quantization,
            "patience": recipe.patience,
            "evaluations_per_epoch": recipe.evaluations_per_epoch,
            "seed": recipe.seed,
            "dtype": network.dtype,
            "device": network.device.type,
        }
        return {name: str(value) for name, value in values.items()}

    def announce(self, logger: logging.Logger, network: Network, dataset: Dataset) -> None:
        """What is about to be done, in two lines."""
        trainable, base = network.num_trainable, network.num_base_parameters
        logger.info(
            "%d rows and %d held back; rank %d on %d linears: %s trainable parameters, %.2f %% of the base's %s",
            dataset.num_rows,
            dataset.num_validation_rows,
            network.config.r,
            len(network.spec.lora_targets),
            f"{trainable:,}",
            100 * trainable / base,
            f"{base:,}",
        )
        logger.info(
            "at most %d steps (%g epochs), learning rate %g, %s, rows %s, on %s",
            self.max_steps,
            self.epochs,
            self.learning_rate,
            str(network.dtype).removeprefix("torch.")
            + ("" if network.quantization == "none" else f" over a {network.quantization} base"),
            "packed" if network.packed else "padded",
            network.device,
        )


def make_plan(recipe: Recipe, network: Network, dataset: Dataset) -> Plan:
    """Rules fill in what the recipe leaves open."""
    steps = Steps.of(recipe, dataset)
    return Plan(
        **vars(steps),
        learning_rate=recipe.learning_rate or learning_rate_for(network.num_base_parameters),
        num_warmup=round(recipe.warmup_fraction * steps.max_steps),
    )
