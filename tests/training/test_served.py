"""What training writes is what the daemon takes: plain A and B, of any rank, unless it was told of a limit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import LlamaForCausalLM

from adapterd.config import EngineSettings, TrainSettings
from adapterd.daemon import Daemon
from adapterd.errors import AdapterRefused
from adapterd.file_names import WEIGHTS_FILE
from adapterd.training.train import train
from tests.tiny import spec_of
from tests.training.runs import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def call(**changes: object) -> Path:
        recipe = {"base": str(base), "data": write_rows(tmp_path / "train.jsonl"), "name": "support"}
        recipe |= {"out": tmp_path / "out", "epochs": 0.4, "learning_rate": 1e-2, "device": "cpu"}
        return train(TrainSettings.model_validate(recipe | changes))

    return call


def test_an_adapter_is_its_matrices_and_nothing_of_the_base(trained: Callable[..., Path], base: Path) -> None:
    with safe_open(trained(rank=4) / WEIGHTS_FILE, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in sizes)
    linears = spec_of(LlamaForCausalLM.from_pretrained(base)).lora_targets
    assert sum(sizes.values()) == sum(4 * (d_in + d_out) for d_out, d_in in linears.values())


def test_any_rank_is_served_unless_a_limit_is_set_and_then_the_limit_is_named(
    trained: Callable[..., Path], base: Path
) -> None:
    """Training itself serves the adapter without a limit, in the round trip."""
    directory = trained(rank=64)
    settings = {"base": str(base), "adapters": (directory,), "device": "cpu", "max_lora_rank": 16}
    daemon = Daemon.build(EngineSettings.model_validate(settings))
    daemon.registry.start()
    try:
        daemon.registry.wait_loaded(60)
        with pytest.raises(
            AdapterRefused, match="has rank 64 and --max-lora-rank is 16; set it higher, or leave"
        ):
            daemon.registry.resolve_waiting("base:support", 60)
    finally:
        daemon.registry.stop()
