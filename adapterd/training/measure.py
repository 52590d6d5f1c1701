"""A few steps of training, timed: what an estimate stands on. Nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterd.render import Renderer
from adapterd.training.batches import epoch_batches
from adapterd.training.data import Example
from adapterd.training.memory import fit_memory
from adapterd.training.network import Network, build_network
from adapterd.training.recipe import Recipe
from adapterd.training.rules import MAX_GRADIENT_NORM


@dataclass(frozen=True)
class Measured:
    """What training costs here. Tokens are those of whole rows, prompts included, padding not.

    `evaluation_tokens_per_second` is for rows that are only looked at; `load_seconds` is until the base stands ready.
    """

    tokens_per_second: float
    evaluation_tokens_per_second: float
    load_seconds: float
    peak_bytes: int
    num_base_parameters: int
    num_trainable: int
    device: str
    dtype: str


def measure_training(
    recipe: Recipe, renderer: Renderer, examples: Sequence[Example], *, max_seconds: float = 10.0
) -> Measured:
    """Build the network and train on real batches for `max_seconds` (one warm-up step and two more at least)."""
    began = time.perf_counter()
    network = build_network(recipe, renderer)
    fit_memory(network, recipe, max(example.num_tokens for example in examples))
    load_seconds = time.perf_counter() - began
    optimizer = torch.optim.AdamW(network.trainable.values(), lr=1e-6)
    batches = epoch_batches(examples, batch_size=recipe.batch_size, seed=recipe.seed, epoch=0)
    _step(network, optimizer, batches[0])
    seconds, tokens, steps = 0.0, 0, 0
    while steps < 2 or (seconds < max_seconds and steps < len(batches)):
        chosen = batches[steps % len(batches)]
        began = time.perf_counter()
        _step(network, optimizer, chosen)
        _wait(network.device)
        seconds += time.perf_counter() - began
        tokens += sum(example.num_tokens for example in chosen)
        steps += 1
    began = time.perf_counter()
    network.evaluate(batches[0])
    evaluated = sum(example.num_tokens for example in batches[0])
    return Measured(
        tokens_per_second=tokens / seconds,
        evaluation_tokens_per_second=evaluated / (time.perf_counter() - began),
        load_seconds=load_seconds,
        peak_bytes=network.peak_bytes(),
        num_base_parameters=network.num_base_parameters,
        num_trainable=network.num_trainable,
        device=str(network.device),
        dtype=str(network.dtype).removeprefix("torch."),
    )


def _step(network: Network, optimizer: torch.optim.Optimizer, examples: Sequence[Example]) -> None:
    network.gradient(examples)
    torch.nn.utils.clip_grad_norm_(network.trainable.values(), MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
