"""What a recipe comes to on this base and these rows: rates and steps, and what makes a run the same run."""

import logging
from dataclasses import dataclass

from adapterd.training.dataset import Dataset
from adapterd.training.network import Network
from adapterd.training.recipe import Recipe
from adapterd.training.rules import epochs_for, learning_rate_for, num_steps_for, steps_per_epoch


@dataclass(frozen=True)
class Plan:
    """The numbers that nobody has to give, settled. `max_steps` is the most; the schedule may end sooner."""

    learning_rate: float
    epochs: float
    steps_per_epoch: int
    max_steps: int
    num_warmup: int
    steps_per_evaluation: int

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
    epochs = recipe.epochs or epochs_for(dataset.num_rows)
    per_epoch = steps_per_epoch(len(dataset.training), recipe.batch_size)
    max_steps = num_steps_for(len(dataset.training), recipe.batch_size, epochs)
    return Plan(
        learning_rate=recipe.learning_rate or learning_rate_for(network.num_base_parameters),
        epochs=epochs,
        steps_per_epoch=per_epoch,
        max_steps=max_steps,
        num_warmup=round(recipe.warmup_fraction * max_steps),
        steps_per_evaluation=max(1, round(per_epoch / recipe.evaluations_per_epoch)),
    )
