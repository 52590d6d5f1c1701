"""What a person sees of a run: a bar on a terminal, lines in a log."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from adapterd.training.history import StepRecord

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Steps, loss, tokens a second and minutes left. Speed counts from `start`, so a resumed run shows its own."""

    def __init__(self, first_step: int, max_steps: int, steps_per_epoch: int) -> None:
        self._first_step = first_step
        self._steps_per_epoch = steps_per_epoch
        self._began = self._last_line = time.monotonic()
        self.num_tokens = 0
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not _is_terminal()
        )
        self._valid = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def step(self, record: StepRecord, *, num_tokens: int, last_step: int) -> None:
        """After a step of `num_tokens`; `last_step` is where the run ends as things stand now."""
        self.num_tokens += num_tokens
        if record.valid_loss is not None:
            self._valid = f", validation {record.valid_loss:.4f} ({record.valid_accuracy:.1%} of tokens)"
        rate = self.num_tokens / max(self.seconds, 1e-9)
        if not self._bar.disable:
            self._bar.total = last_step
            self._bar.set_postfix_str(f"loss {record.train_loss:.4f}{self._valid}, {rate:,.0f} tokens/s")
            self._bar.update(1)
            return
        if record.valid_loss is not None or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            done = record.step - self._first_step
            left = self.seconds / done * (last_step - record.step)
            _logger.info(
                "step %d/%d (epoch %.1f): loss %.4f%s; %s tokens/s, at most %.1f minutes left",
                record.step,
                last_step,
                record.step / self._steps_per_epoch,
                record.train_loss,
                self._valid if record.valid_loss is not None else "",
                f"{rate:,.0f}",
                left / 60,
            )

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def lines_above_bar() -> Iterator[None]:
    """While a bar is on the terminal, log lines are written above it."""
    if not _is_terminal():
        yield
        return
    with logging_redirect_tqdm():
        yield


def _is_terminal() -> bool:
    return sys.stderr.isatty()
