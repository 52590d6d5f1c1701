import shlex

from adapterd.config import TrainSettings
from adapterd.training.card import eval_command
from tests.training.runs import but


def test_an_adapter_of_a_4_bit_base_is_measured_on_one(told: TrainSettings) -> None:
    """On another it is refused."""
    words = shlex.split(eval_command("FOLDER", but(told, quantization="bnb-4bit"), full_paths=False))
    assert words[words.index("--quantization") + 1] == "bnb-4bit"
    assert "--quantization" not in eval_command("FOLDER", told, full_paths=False)
