"""What is known of an adapter's exactness: our product of each adapted module against PEFT's own layer."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["exact", "within bound", "refused"]


@dataclass(frozen=True)
class Proof:
    """`exact`: equal to PEFT's float32 layer up to the order of float32 sums. `within bound`: the base computes in
    16 bits, and the difference is what their rounding allows. An adapter whose proof is `refused` is not served.

    `max_error` is the largest difference over all modules, each in units of its own largest output. An adapter
    with `has_effect` false changes nothing: its products are zero.
    """

    verdict: Verdict
    max_error: float
    num_modules: int
    has_effect: bool
    seconds: float
