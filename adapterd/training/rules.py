"""Settings that nobody gave, by rule from the size of the base and of the rows. Numbers only, no torch.

Each rule is a starting point with its reason beside it; every one of them is overruled by its flag.
"""

import math

DEFAULT_RANK = 16
ALPHA_PER_RANK = 2.0
MAX_GRADIENT_NORM = 1.0

_REFERENCE_RATE = 2e-4
_REFERENCE_PARAMETERS = 8e9
_RATE_EXPONENT = 0.3
_LOWEST_RATE, _HIGHEST_RATE = 5e-5, 2e-3

_ROWS_SEEN_AT_MOST = 12_000
_MOST_EPOCHS, _FEWEST_EPOCHS = 10.0, 1.0


def learning_rate_for(num_parameters: int) -> float:
    """2e-4 at 8 billion parameters, more for a smaller base: the power law 2e-4 (8e9 / N) ** 0.3, two digits.

    2e-4 is the usual LoRA rate of 7 to 8 billion (about ten times that of full fine-tuning, whatever the rank:
    Schulman et al., "LoRA Without Regret", 2025). The exponent makes it 2e-3 for the embedded base of 3.5
    million, which is what its adapters were tuned to: 4.3e-4 at 0.6 billion, 1e-4 at 70. Bounded by 5e-5 and 2e-3.
    """
    rate = _REFERENCE_RATE * (_REFERENCE_PARAMETERS / max(num_parameters, 1)) ** _RATE_EXPONENT
    return float(f"{min(max(rate, _LOWEST_RATE), _HIGHEST_RATE):.1e}")


def epochs_for(num_rows: int) -> float:
    """Passes over the rows at most: 12,000 rows are seen, in 1 to 10 passes. Early stopping ends most runs sooner.

    200 rows: 10; 1700: 7; 12,000 and more: 1.
    """
    return min(max(float(round(_ROWS_SEEN_AT_MOST / num_rows)), _FEWEST_EPOCHS), _MOST_EPOCHS)


def num_steps_for(num_examples: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps at most."""
    return math.ceil(epochs * steps_per_epoch(num_examples, batch_size))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return math.ceil(num_examples / batch_size)
