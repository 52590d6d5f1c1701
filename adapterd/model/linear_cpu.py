"""Linears on a CPU: the same weights, multiplied by whatever is fastest here for the number of tokens at hand.

Which way wins depends on the processor (with AMX torch's own 16-bit product is very good for many tokens, without
it is six times slower than float32) and on the tokens: so it is measured at load, on the model's own weights.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

LinearFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [..., d_in], weight [d_out, d_in], bias [d_out] or None) -> [..., d_out], all of one dtype."""

TOKEN_COUNTS = (1, 4, 8, 16, 32, 64, 128, 512)
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


def float32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 16-bit linear through float32 products, a few rows of the weight at a time."""
    d_out, d_in = weight.shape
    rows = x.reshape(-1, d_in).float()
    y = torch.empty(rows.shape[0], d_out)
    step = max(_FLOAT32_CHUNK // d_in, 1)
    for start in range(0, d_out, step):
        torch.mm(rows, weight[start : start + step].float().T, out=y[:, start : start + step])
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], d_out)


def native_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The C++ operator: weights read once, row by row, at memory speed; float32 sums."""
    y: torch.Tensor = torch.ops.adapterd.linear(x, weight, bias)
    return y


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

    def __init__(self, linear: nn.Linear, choice: LinearChoice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.choice = choice
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Linear's
        way = self.choice.way(input.numel() // input.shape[-1])
        return way(input, self.weight, self.bias)


def candidates(dtype: torch.dtype, with_native: bool) -> dict[str, LinearFunction]:
    """The ways to multiply that exist for a dtype, by name; the likeliest to win first."""
    found: dict[str, LinearFunction] = {}
    if with_native and dtype in (torch.bfloat16, torch.float32):
        found["native"] = native_linear
    if dtype in (torch.bfloat16, torch.float16):
        found["float32"] = float32_linear
    found["torch"] = F.linear
    return found


def use_fastest_linears(model: nn.Module, with_native: bool) -> None:
    """Choose, and replace the model's linears in place. Modules of other types are left alone.

    16 bit: by measurement on the model's own weights. float32: by a rule, so that two starts compute alike.
    """
    linears = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    if not linears:
        return
    weights = [linear.weight for linear in linears.values()]
    ways = candidates(weights[0].dtype, with_native)
    if len(ways) == 1 or any(weight.dtype != weights[0].dtype for weight in weights):
        return
    if weights[0].dtype == torch.float32:
        choice = LinearChoice(((_FLOAT32_NATIVE_TOKENS, native_linear),), F.linear)
    else:
        choice = _measure(weights, ways)
    for path, linear in linears.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, CpuLinear(linear, choice))


def _sample(weights: Sequence[torch.Tensor], num_bytes: int) -> list[torch.Tensor]:
    chosen: list[torch.Tensor] = []
    for weight in weights:
        if chosen and sum(w.nbytes for w in chosen) + weight.nbytes > num_bytes:
            break
        chosen.append(weight)
    return chosen


@torch.inference_mode()
def _measure(weights: Sequence[torch.Tensor], ways: Mapping[str, LinearFunction]) -> LinearChoice:
    """The fastest way at each token count."""
    names: list[str] = []
    for count in TOKEN_COUNTS:
        sample = _sample(weights, _SAMPLE_BYTES[count <= _FEW_TOKENS])
        inputs = {w.shape[1]: torch.randn(count, w.shape[1]).to(w.dtype) for w in sample}
        fastest, bound = "", float("inf")
        for name, function in ways.items():
            seconds = _best_seconds(function, sample, inputs, give_up=2 * bound)
            if seconds < _WORTH * bound:
                fastest, bound = name, seconds
        names.append(fastest)
    said = ", ".join(f"to {count} {name}" for count, name in zip(TOKEN_COUNTS, names, strict=True))
    logger.info("linears by number of tokens: %s", said)
    steps = tuple((count, ways[name]) for count, name in zip(TOKEN_COUNTS, names, strict=True))
    return LinearChoice(steps, steps[-1][1])


def _best_seconds(
    function: LinearFunction,
    weights: Sequence[torch.Tensor],
    inputs: Mapping[int, torch.Tensor],
    give_up: float,
) -> float:
    """Best of three; of one, if that one is beyond `give_up`."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for weight in weights:
            function(inputs[weight.shape[1]], weight, None)
        best = min(best, time.perf_counter() - begin)
        if best > give_up:
            break
    return best
