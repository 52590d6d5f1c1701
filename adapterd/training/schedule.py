"""How the learning rate moves and when training ends, from validation losses alone. No tensors.

    1 |    ____________________
      |   /                    \\
      |  /                      \\
    0 |_/________________________\\___ steps
       warm-up      hold       decay

Held until the validation loss flattens (`patience` evaluations without a better one) or until what is left of
the steps is just enough, then decayed in a line to nothing (warmup-stable-decay: Hu et al., MiniCPM,
arXiv 2404.06395). Ends with the decay, or with `patience` evaluations in it that gain nothing, however many before
it gained nothing.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Schedule:
    """`max_steps` bounds all of it. The decay is `decay_fraction` of the steps; 1 decays from the warm-up on.

    Evaluations without a better loss are counted while the rate is held, and from nothing again in the decay.
    """

    max_steps: int
    num_warmup: int
    decay_fraction: float
    patience: int
    decay_start: int = field(init=False)
    decay_end: int = field(init=False)
    flat_at: int | None = field(default=None, init=False)
    best_step: int = field(default=0, init=False)
    best_loss: float = field(default=math.inf, init=False)
    evaluations_without_gain: int = field(default=0, init=False)
    decay_evaluations_without_gain: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.decay_end = self.max_steps
        self.decay_start = max(self.num_warmup, self.max_steps - round(self.decay_fraction * self.max_steps))

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied with in `step`, the first being 1."""
        if step <= self.num_warmup:
            return step / self.num_warmup
        if step <= self.decay_start:
            return 1.0
        return (self.decay_end - step + 1) / (self.decay_end - self.decay_start)

    def observe(self, step: int, loss: float) -> bool:
        """The validation loss after `step`; True if it is the best so far."""
        if loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self.evaluations_without_gain = self.decay_evaluations_without_gain = 0
            return True
        if step > self.decay_start:
            self.decay_evaluations_without_gain += 1
        elif step > self.num_warmup:
            self.evaluations_without_gain += 1
            if self.evaluations_without_gain >= self.patience and step < self.decay_start:
                self._begin_decay(step)
        return False

    def is_done(self, step: int) -> bool:
        """Whether `step` was the last one."""
        return step >= self.decay_end or self.decay_evaluations_without_gain >= self.patience

    def state(self) -> dict[str, int | float | None]:
        """What `restore` needs; plain numbers."""
        return {
            "decay_start": self.decay_start,
            "decay_end": self.decay_end,
            "flat_at": self.flat_at,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "evaluations_without_gain": self.evaluations_without_gain,
            "decay_evaluations_without_gain": self.decay_evaluations_without_gain,
        }

    def restore(self, state: dict[str, int | float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _begin_decay(self, step: int) -> None:
        length = math.ceil(step * self.decay_fraction / (1 - self.decay_fraction))
        self.flat_at = self.decay_start = step
        self.decay_end = min(self.max_steps, step + max(1, length))
