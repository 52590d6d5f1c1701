"""How rows go through the network: what is kept of them, and what is not."""

import weakref

import pytest
import torch

from adapterd.config import TrainSettings
from adapterd.render import Renderer
from adapterd.training.batches import num_labels
from adapterd.training.data import Example
from adapterd.training.network import Network, build_network
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=["on", "off"], ids=["packed", "padded"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)
    recipe = {"base": str(directory), "data": "none", "name": "x", "rank": 2, "device": "cpu"}
    recipe |= {"packing": request.param, "micro_batch_tokens": 120}
    return build_network(TrainSettings.model_validate(recipe), Renderer.load(directory))


def test_evaluation_makes_logits_of_answers_alone_and_keeps_none(network: Network) -> None:
    """However many rows are evaluated: at no time is there more than one forward's logits."""
    examples = [Example(line, tuple(range(5, 55)), (7, 8, 2)) for line in range(1, 41)]
    alive: list[weakref.ref[torch.Tensor]] = []
    shapes: list[torch.Size] = []

    def look(_module: object, _inputs: object, logits: torch.Tensor) -> None:
        assert not [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(logits))
        shapes.append(logits.shape)

    hook = network.model.get_output_embeddings().register_forward_hook(look)
    loss, _ = network.evaluate(examples)
    hook.remove()
    assert loss > 0
    assert len(shapes) == 20  # two rows of 53 tokens fit into 120
    assert sum(shape[0] * shape[1] for shape in shapes) == num_labels(examples) == 120
    assert all(reference() is None for reference in alive)
