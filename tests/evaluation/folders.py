"""Adapter folders over a tiny random base: what an evaluation is pointed at."""

import json
from pathlib import Path

import torch

from adapterd.adapter_writer import write_adapter
from adapterd.config import EvalSettings
from adapterd.evaluation.run import Evaluation, evaluate, write_files
from adapterd.training.card import RESULTS_BEGIN, RESULTS_END
from tests.tiny import tiny_llama

MODULES = {f"model.layers.{layer}.mlp.down_proj": (32, 48) for layer in range(2)}


def write_random_adapter(directory: Path, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        module: (torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator))
        for module, (d_out, d_in) in MODULES.items()
    }
    targets = ["down_proj"]
    write_adapter(
        directory, tensors, r=4, lora_alpha=8, target_modules=targets, base_name="t", base_fingerprint=None
    )


def row(prompt: str, answer: str, *tags: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "tags": list(tags)}


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_folders(directory: Path) -> None:
    """`base`, and adapters/one (6 held-out rows) and adapters/two (7), each with training rows and a card."""
    tiny_llama(directory / "base")
    for seed, name in enumerate(("one", "two"), 1):
        folder = directory / "adapters" / name
        write_random_adapter(folder, seed=seed)
        asked = [row(f"Ticket {i}", "A: 1\nB: 2", *(["edge"] if i == 0 else [])) for i in range(5 + seed)]
        write_rows(folder / "heldout.jsonl", asked)
        write_rows(folder / "train.jsonl", [row(f"Old ticket {i}", f"A: {i}\nB: 2") for i in range(4)])
        (folder / "README.md").write_text(f"# {name}\n\n{RESULTS_BEGIN}\nold\n{RESULTS_END}\n\nAfter.\n")


def evaluate_and_write(settings: EvalSettings) -> Evaluation:
    """As the command does."""
    found = evaluate(settings)
    write_files(found, settings)
    return found
