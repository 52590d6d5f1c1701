"""Linears on a CPU: the same weights, multiplied by whatever is fastest here for the number of tokens at hand.

Which way wins depends on the processor (with AMX torch's own 16-bit product is very good for many tokens, without
it is six times slower than float32) and on the tokens: so it is measured at load, on the model's own weights.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from adapterd.model.int8 import Int8Linear

logger = logging.getLogger(__name__)

LinearFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
"""(x [..., d_in], weight [d_out, d_in], bias [d_out] or None, scales) -> [..., d_out], all of one dtype.

A weight of int8 has scales, float32 [d_out], as model/int8.py explains; any other has None.
"""

TOKEN_COUNTS = (1, 4, 8, 16, 32, 64, 128, 512)
_REACH = 2
"""A way that takes so many times the best one's time has lost, whatever the machine did meanwhile."""
_ENOUGH_SECONDS = 0.05
"""Of measuring one way at one number of tokens: the shorter a pass, the more of them show what it takes undisturbed."""
_SAMPLE_BYTES = {True: 64 << 20, False: 8 << 20}
"""Weights to measure on, for few tokens and for many. Few: more than a cache holds, or a product would look faster
than it ever is. Many: the weights' way from memory no longer counts.
"""
_FEW_TOKENS = 32
_WORTH = 0.9
"""A way other than the first must take at most this share of its time: below that the measurement is noise."""
_FLOAT32_NATIVE_TOKENS = 32
"""In float32 the C++ operator wins or ties up to some 32 to 100 tokens, by the weight's size; MKL wins after."""
_FLOAT32_CHUNK = 1 << 20
"""Weights to turn to float32 at a time: 4 MiB, so that they are still in cache when they are multiplied."""


def float32_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear of 16 bits or 8 through float32 products, a few rows of the weight at a time."""
    d_out, d_in = weight.shape
    rows = x.reshape(-1, d_in).float()
    y = torch.empty(rows.shape[0], d_out)
    step = max(_FLOAT32_CHUNK // d_in, 1)
    for start in range(0, d_out, step):
        torch.mm(rows, weight[start : start + step].float().T, out=y[:, start : start + step])
    if scales is not None:
        y *= scales
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], d_out)


def native_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The C++ operator: weights read once, row by row, at memory speed; float32 sums."""
    y: torch.Tensor = torch.ops.adapterd.linear(x, weight, bias, scales)
    return y


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    assert scales is None
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class LinearChoice:
    """`steps`: (number of tokens, what to use up to there), rising; `beyond` is for more."""

    steps: tuple[tuple[int, LinearFunction], ...]
    beyond: LinearFunction

    def way(self, num_tokens: int) -> LinearFunction:
        for count, function in self.steps:
            if num_tokens <= count:
                return function
        return self.beyond


class CpuLinear(nn.Linear):
    """nn.Linear with the same parameters and another way to multiply."""

    scales: None = None

    def __init__(self, linear: nn.Linear, choice: LinearChoice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.choice = choice
        self.train(linear.training)

    @property
    def matrix(self) -> torch.Tensor:
        """What is multiplied."""
        return self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Linear's
        way = self.choice.way(input.numel() // input.shape[-1])
        return way(input, self.weight, self.bias, None)


class CpuInt8Linear(Int8Linear):
    """Int8Linear with the same whole numbers and another way to multiply."""

    def __init__(self, linear: Int8Linear, choice: LinearChoice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.product = linear.dtype, linear.product
        self.register_buffer("values", linear.values)
        self.register_buffer("scales", linear.scales)
        self.bias = linear.bias
        self.choice = choice
        self.train(linear.training)

    @property
    def matrix(self) -> torch.Tensor:
        """What is multiplied, and then scaled."""
        return self.values

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        way = self.choice.way(input.numel() // input.shape[-1])
        return way(input, self.values, self.bias, self.scales)


AnyCpuLinear = CpuLinear | CpuInt8Linear


def candidates(dtype: torch.dtype, with_native: bool, *, is_int8: bool = False) -> dict[str, LinearFunction]:
    """The ways to multiply that exist for a dtype, by name; the likeliest to win first."""
    found: dict[str, LinearFunction] = {}
    if with_native and dtype in (torch.bfloat16, torch.float32):
        found["native"] = native_linear
    if is_int8 or dtype in (torch.bfloat16, torch.float16):
        found["float32"] = float32_linear
    if not is_int8:
        found["torch"] = torch_linear
    return found


def use_fastest_linears(model: nn.Module, with_native: bool) -> None:
    """Choose, and replace the model's linears in place. Modules of other types are left alone.

    16 bit: by measurement on the model's own weights. float32: by a rule, so that two starts compute alike.
    """
    plain = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    choice = _choose([(m.weight, None) for m in plain.values()], with_native)
    if choice is not None:
        for path, linear in plain.items():
            model.set_submodule(path, CpuLinear(linear, choice))
    whole = {path: m for path, m in model.named_modules() if type(m) is Int8Linear}
    choice = _choose(
        [(m.values, m.scales) for m in whole.values()], with_native, {m.dtype for m in whole.values()}
    )
    if choice is not None:
        for path, int8 in whole.items():
            model.set_submodule(path, CpuInt8Linear(int8, choice))


Weight = tuple[torch.Tensor, torch.Tensor | None]
"""What is multiplied, and its scales if it is int8."""


def _choose(
    weights: Sequence[Weight], with_native: bool, dtypes: Collection[torch.dtype] = ()
) -> LinearChoice | None:
    """What these linears are to use, None for what they do anyway. `dtypes`: of the inputs, where not the weights'."""
    dtypes = set(dtypes) or {weight.dtype for weight, _ in weights}
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    ways = candidates(dtype, with_native, is_int8=weights[0][1] is not None)
    if len(ways) == 1:
        return None
    if dtype == torch.float32:
        first, *_, last = ways.values()
        return LinearChoice(((_FLOAT32_NATIVE_TOKENS, first),), last)
    return _measure(weights, ways, dtype)


def _sample(weights: Sequence[Weight], num_bytes: int) -> list[Weight]:
    chosen: list[Weight] = []
    taken = 0
    for weight in weights:
        if chosen and taken + weight[0].nbytes > num_bytes:
            break
        chosen.append(weight)
        taken += weight[0].nbytes
    return chosen


@torch.inference_mode()
def _measure(
    weights: Sequence[Weight], ways: Mapping[str, LinearFunction], dtype: torch.dtype
) -> LinearChoice:
    """The fastest way at each token count."""

    def fastest(count: int) -> str:
        sample = _sample(weights, _SAMPLE_BYTES[count <= _FEW_TOKENS])
        inputs = {w.shape[1]: torch.randn(count, w.shape[1]).to(dtype) for w, _ in sample}
        best, bound = "", float("inf")
        for name, function in ways.items():
            seconds = _best_seconds(function, sample, inputs, give_up=_REACH * bound)
            if seconds < _WORTH * bound:
                best, bound = name, seconds
        return best

    names = by_bisection(TOKEN_COUNTS, fastest)
    said = ", ".join(f"to {count} {name}" for count, name in zip(TOKEN_COUNTS, names, strict=True))
    logger.info("linears by number of tokens: %s", said)
    steps = tuple((count, ways[name]) for count, name in zip(TOKEN_COUNTS, names, strict=True))
    return LinearChoice(steps, steps[-1][1])


def by_bisection(counts: Sequence[int], fastest: Callable[[int], str]) -> list[str]:
    """The fastest of each count: asked for both ends and one in the middle, and between two that differ.

    Ways change places where weights stop and arithmetic begins to count, so between two counts with one winner there
    is no other.
    """
    found: dict[int, str] = {}

    def ask(place: int) -> str:
        if place not in found:
            found[place] = fastest(counts[place])
        return found[place]

    def fill(first: int, last: int) -> None:
        if ask(first) == ask(last):
            found.update((place, found[first]) for place in range(first, last))
        elif last - first > 1:
            fill(first, (first + last) // 2)
            fill((first + last) // 2, last)

    middle = len(counts) // 2
    fill(0, middle)
    fill(middle, len(counts) - 1)
    return [found[place] for place in range(len(counts))]


def _best_seconds(
    function: LinearFunction,
    weights: Sequence[Weight],
    inputs: Mapping[int, torch.Tensor],
    give_up: float,
) -> float:
    """Best of three passes, of two if they take long; infinite once the first is beyond `give_up`, even half done."""
    best, total = float("inf"), 0.0
    for attempt in range(3):
        begin = time.perf_counter()
        for weight, scales in weights:
            function(inputs[weight.shape[1]], weight, None, scales)
            if best == float("inf") and time.perf_counter() - begin > give_up:
                return best
        seconds = time.perf_counter() - begin
        best, total = min(best, seconds), total + seconds
        if attempt > 0 and total > _ENOUGH_SECONDS:
            break
    return best
