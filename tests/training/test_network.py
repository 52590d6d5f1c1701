"""How rows go through the network: what is kept of them, what is not, and what happens if memory does not suffice."""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapterd.config import TrainSettings
from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.batches import num_labels
from adapterd.training.data import Example
from adapterd.training.memory import fit_memory
from adapterd.training.network import Network, build_network
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Build = Callable[..., Network]


@pytest.fixture(scope="module", params=["on", "off"], ids=["packed", "padded"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)

    def call(**changes: object) -> Network:
        recipe = {"base": str(directory), "data": "none", "name": "x", "rank": 2, "device": "cpu"}
        recipe |= {"packing": request.param, "micro_batch_tokens": 120}
        return build_network(TrainSettings.model_validate(recipe | changes), Renderer.load(directory))

    return call


@pytest.fixture(scope="module")
def network(build: Build) -> Network:
    return build()


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


@contextmanager
def memory_for(model: torch.nn.Module, max_tokens: int) -> Iterator[list[int]]:
    """A device on which a forward of more tokens fails, as CUDA's allocator says it; yields the tokens of each."""
    asked: list[int] = []

    def allocate(_module: object, _arguments: object, named: dict[str, torch.Tensor]) -> None:
        asked.append(named["input_ids"].numel())
        assert len(asked) < 50, "it tries for ever"
        if asked[-1] > max_tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        yield asked
    finally:
        hook.remove()


def rows(*num_tokens: int) -> list[Example]:
    return [Example(line, tuple(range(5, 2 + n)), (7, 8, 2)) for line, n in enumerate(num_tokens, 1)]


def gradients(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in network.trainable.items() if p.grad is not None}


def test_out_of_memory_forwards_take_less_until_they_fit_and_the_gradient_is_the_same(build: Build) -> None:
    examples = rows(20, 30, 50, 55, 58)  # the first forward fits, the second does not
    roomy, tight = build(), build()
    expected = roomy.gradient(examples)
    with memory_for(tight.model, 100) as asked:
        found = tight.gradient(examples)
    assert found == pytest.approx(expected, abs=1e-5)
    assert gradients(tight).keys() == gradients(roomy).keys() == tight.trainable.keys()
    for name, gradient in gradients(tight).items():
        torch.testing.assert_close(gradient, gradients(roomy)[name], atol=1e-5, rtol=1e-3)
    assert tight.checkpointed
    assert asked[0] <= 100 < max(asked)
    with memory_for(tight.model, 100) as asked:
        tight.gradient(examples)
    assert max(asked) <= 100  # for good


@pytest.mark.parametrize(
    ("told", "way_out"), [("auto", "use a smaller"), ("off", "use --gradient-checkpointing auto, a smaller")]
)
def test_a_row_that_does_not_fit_alone_is_named_at_once(build: Build, told: str, way_out: str) -> None:
    """It goes alone however few tokens are allowed at once, so allowing fewer would never end."""
    network = build(gradient_checkpointing=told)
    message = f"no memory for the 200 tokens of the row in line 2; {way_out} --max-length"
    with memory_for(network.model, 100) as asked, pytest.raises(InvalidRequest, match=message):
        network.gradient(rows(20, 200, 30))
    assert asked.count(199) == (2 if told == "auto" else 1)


def test_activations_that_are_to_be_kept_are_kept(build: Build) -> None:
    network = build(gradient_checkpointing="off")
    with memory_for(network.model, 50):
        network.gradient(rows(*[20] * 6))
    assert not network.checkpointed
    assert network.micro_batch_tokens < 120


class NoLayers(torch.nn.Module):
    """As a family without gradient checkpointing looks: an embedding and a head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed = torch.nn.Embedding(config.vocab_size, 4)
        self.head = torch.nn.Linear(4, config.vocab_size)

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_others: object
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids))[:, logits_to_keep])


def test_a_family_without_checkpointing_is_trained_in_smaller_forwards(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    model = NoLayers(network.model.config)
    own = replace(network, model=model, trainable=dict(model.named_parameters()), may_checkpoint=False)
    recipe = TrainSettings.model_validate({"data": "none", "name": "x"})
    with caplog.at_level(logging.WARNING):
        fit_memory(own, recipe, longest=10**12)
    assert "NoLayers cannot compute them again" in caplog.text
    with memory_for(model, 50):
        own.gradient(rows(*[20] * 6))
    assert not own.checkpointed
    with memory_for(model, 50), pytest.raises(InvalidRequest, match=r"in line 1; use a smaller --max-length"):
        own.gradient(rows(200))
