"""What a training run tells Prometheus while it lasts, in the words of the daemon's own metrics.

`python -m adapterd.training.metrics` prints the table as docs/metrics.md has it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import adapterd
from adapterd.exposition import Family, Format, render
from adapterd.series import Series, markdown
from adapterd.training.history import StepRecord

State = Literal["preparing", "training", "proving"]
"""Reading rows and base; taking steps; asking a fresh engine whether it answers as the trainer does. Then the process
ends, and its exit status says how."""

_ADAPTER = ("adapter",)

# fmt: off
SERIES: tuple[Series, ...] = (
    Series("adapterd_training_info", "What is trained here.", "gauge", ("adapter", "base", "version")),
    Series("adapterd_training_state", "1 for what the run does now: preparing, training or proving.", "gauge",
           ("adapter", "state")),
    Series("adapterd_training_step", "Steps done, those before a resumption too.", "gauge", _ADAPTER),
    Series("adapterd_training_last_step", "Step after which it ends, as things stand: early stopping moves it.",
           "gauge", _ADAPTER),
    Series("adapterd_training_tokens_total", "Tokens trained on by this process.", "counter", _ADAPTER),
    Series("adapterd_training_learning_rate", "Of the last step.", "gauge", _ADAPTER),
    Series("adapterd_training_loss", "Mean loss of the last step's rows, in nats.", "gauge", _ADAPTER),
    Series("adapterd_training_accuracy", "Share of first-ranked tokens in the last step's rows.", "gauge", _ADAPTER),
    Series("adapterd_training_validation_loss", "Of the last evaluation.", "gauge", _ADAPTER),
    Series("adapterd_training_validation_accuracy", "Of the last evaluation.", "gauge", _ADAPTER),
    Series("adapterd_training_saved_timestamp_seconds", "Unix time of the last checkpoint, or of the first step while"
           " there is none: a killed run loses what came after.", "gauge", _ADAPTER),
    Series("adapterd_training_checkpoint_interval_seconds", "As set by --checkpoint-seconds.", "gauge", _ADAPTER),
)
# fmt: on


class TrainingMetrics:
    """The series of one run. Every method may be called from any thread."""

    def __init__(
        self,
        adapter: str,
        base: str,
        *,
        checkpoint_seconds: float,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._adapter = adapter
        self._unix_time = unix_time
        self._lock = threading.Lock()  # guards all below
        self._families = {s.name: Family(s.name, s.help, s.kind, s.labels, s.buckets) for s in SERIES}
        self._families["adapterd_training_info"].set((adapter, base, adapterd.__version__), 1)
        self._set("adapterd_training_checkpoint_interval_seconds", checkpoint_seconds)
        self.enter("preparing")

    def render(self, format: Format) -> bytes:
        with self._lock:
            return render(self._families.values(), format)

    def enter(self, state: State) -> None:
        """From now on the run does this."""
        with self._lock:
            for other in get_args(State):
                self._families["adapterd_training_state"].set((self._adapter, other), other == state)

    def begin(self, history: Sequence[StepRecord], *, last_step: int) -> None:
        """Steps begin now. `history`: those of an earlier run that this one goes on from, and the first evaluation."""
        self.enter("training")
        with self._lock:
            for record in history:
                self._record(record)
            self._set("adapterd_training_last_step", last_step)
            self._families["adapterd_training_tokens_total"].add((self._adapter,), 0)
            self._set("adapterd_training_saved_timestamp_seconds", self._unix_time())

    def step(self, record: StepRecord, *, learning_rate: float, num_tokens: int, last_step: int) -> None:
        """After a step of `num_tokens`; `last_step` is where the run ends as things stand now."""
        with self._lock:
            self._record(record)
            self._set("adapterd_training_last_step", last_step)
            self._set("adapterd_training_learning_rate", learning_rate)
            self._families["adapterd_training_tokens_total"].add((self._adapter,), num_tokens)

    def saved(self) -> None:
        """A checkpoint of the last step is on the disk."""
        with self._lock:
            self._set("adapterd_training_saved_timestamp_seconds", self._unix_time())

    # Called with the lock held

    def _record(self, record: StepRecord) -> None:
        self._set("adapterd_training_step", record.step)
        named = zip(
            ("loss", "accuracy", "validation_loss", "validation_accuracy"), record.values(), strict=True
        )
        for name, value in named:
            if value is not None:
                self._set(f"adapterd_training_{name}", value)

    def _set(self, name: str, value: float) -> None:
        self._families[name].set((self._adapter,), value)


if __name__ == "__main__":
    print(markdown(SERIES), end="")
