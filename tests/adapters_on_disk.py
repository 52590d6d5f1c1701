"""Adapters of one tiny linear, whose every number says which version it is; and the registry that reads them."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from adapterd.adapter_writer import write_adapter
from adapterd.core import BaseSpec
from adapterd.entries import AdapterEntry
from adapterd.errors import ModelNotFound, Unavailable
from adapterd.registry import AdapterRegistry
from adapterd.token_table import TokenizerIdentity

MODULE = "model.layers.0.self_attn.q_proj"
SPEC = BaseSpec("mini", "mini", "LlamaForCausalLM", "float32", 400, 256, {MODULE: (8, 8)}, frozenset({2}))
NO_TOKENIZER = TokenizerIdentity(frozenset(), {})
FINGERPRINT = "f1" * 32


def write(directory: Path, value: float, *, sealed: bool = True, base_fingerprint: str | None = None) -> Path:
    """An adapter whose every number is `value`."""
    tensors = {MODULE: (torch.full((2, 8), value), torch.full((8, 2), value))}
    write_adapter(
        directory,
        tensors,
        r=2,
        lora_alpha=2,
        target_modules=["q_proj"],
        base_name="mini",
        base_fingerprint=base_fingerprint,
    )
    if not sealed:
        (directory / "adapterd.json").unlink()
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def value_of(registry: AdapterRegistry, model: str) -> float:
    """The number that `model` is made of now, read if it has to be."""
    resolved = registry.resolve_waiting(model, 20)
    lease = registry.lease(resolved.mix)
    ((adapter_id, _),) = resolved.mix
    matrices = registry.weights(adapter_id).modules[0]
    lease.release()
    values = {*matrices.a.unique().tolist(), *matrices.b.unique().tolist()}
    assert len(values) == 1, f"a mix of two versions: {values}"
    return float(values.pop())


def serves(registry: AdapterRegistry, model: str, value: float) -> bool:
    """Whether `model` is made of this number by now; not if it is still on its way."""
    try:
        return value_of(registry, model) == value
    except (ModelNotFound, Unavailable):
        return False


def entry_of(registry: AdapterRegistry, name: str) -> AdapterEntry | None:
    return next((entry for entry in registry.list() if entry.name == name), None)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)
