"""The proof itself: what it sets aside, and what it can be asked."""

import json
from pathlib import Path

import pytest
import torch

from adapterd.config import TrainSettings
from adapterd.daemon import Daemon
from adapterd.file_names import SEAL_FILE
from adapterd.model.pages import adapter_bytes_of_rank
from adapterd.render import Renderer
from adapterd.training.data import encode_rows, read_rows
from adapterd.training.round_trip import proof_settings
from adapterd.training.train import train
from tests.training.runs import but

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CONTEXT = 256
"""Of the tiny base."""


@pytest.mark.parametrize("rank", [4, 64])
def test_room_for_the_adapter_does_not_depend_on_what_is_free(rank: int, base: Path, tmp_path: Path) -> None:
    """A share of what is free may be less than the adapter, and then a whole training is lost at its end."""
    settings = proof_settings(
        tmp_path,
        base=str(base),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization="none",
        rank=rank,
        longest=CONTEXT,
    )
    daemon = Daemon.build(settings)
    of_one = adapter_bytes_of_rank(daemon.spec.lora_targets, rank, torch.float32)
    assert daemon.engine.stats().adapter_bytes_total == 2 * of_one


def test_a_held_back_row_as_long_as_the_context_is_proven(
    told: TrainSettings, base: Path, tmp_path: Path
) -> None:
    held_back = tmp_path / "held_back.jsonl"
    renderer = Renderer.load(base)

    def length_with(num_letters: int) -> int:
        messages = [
            {"role": "user", "content": "x" * num_letters},
            {"role": "assistant", "content": "Category: Other"},
        ]
        held_back.write_text(json.dumps({"messages": messages}) + "\n")
        (example,) = encode_rows(read_rows(held_back), renderer, max_length=10 * CONTEXT, path=held_back)
        return example.num_tokens

    assert length_with(CONTEXT + 1 - length_with(1)) == CONTEXT  # each letter is a token
    directory = train(but(told, validation=held_back, epochs=0.2))
    assert json.loads((directory / SEAL_FILE).read_text())["round_trip"]["num_rows"] == 1
