"""All that a run carries from one step to the next, and its way into a checkpoint and back.

The order of rows is no part of it: an epoch's order is a function of seed and epoch, so a step number says it all.
"""

import logging
import platform
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterd.training.history import StepRecord
from adapterd.training.schedule import Schedule

_logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """`best` holds the parameters of the step with the lowest validation loss, by name, on the device."""

    trainable: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    history: list[StepRecord] = field(default_factory=list)

    def keep_as_best(self) -> None:
        self.best = {name: p.detach().clone() for name, p in self.trainable.items()}

    def snapshot(self) -> dict[str, Any]:
        """Tensors and plain values, for `Checkpoints.save`; shares memory with the run."""
        return {
            "environment": _environment(),
            "weights": {name: p.detach() for name, p in self.trainable.items()},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state(),
            "history": [(record.step, *record.values()) for record in self.history],
            "random": {
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Back to where a snapshot was taken."""
        self.step = int(snapshot["step"])
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(snapshot["weights"][name])
        device = next(iter(self.trainable.values())).device
        self.best = {name: tensor.to(device) for name, tensor in snapshot["best"].items()}
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.schedule.restore(snapshot["schedule"])
        self.history = [StepRecord(*record) for record in snapshot["history"]]
        version, numbers, gauss = snapshot["random"]["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(snapshot["random"]["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(snapshot["random"]["cuda"])
        if snapshot["environment"] != _environment():
            _logger.warning(
                "the run began with %s and goes on with %s: the result may differ in its last bits from an unbroken"
                " run's",
                snapshot["environment"],
                _environment(),
            )


def _environment() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
