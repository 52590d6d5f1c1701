"""A family that is not exact packed and paged does not get past the probe, whatever its way of cheating."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from adapterd.errors import BaseRefused
from adapterd.model.attention import register_attention
from adapterd.model.probe import probe_family
from tests.exactness.families import COMMON, FAMILIES


class HonestConfig(MistralConfig):
    model_type = "honest"


class HonestModel(MistralForCausalLM):
    """Mistral under another name: the control."""

    config_class = HonestConfig


def replace_mlp(model: Any, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for layer in model.model.layers:
        layer.mlp = wrap(layer.mlp)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class ReadsNeighbour(Wrapper):
    """RWKV's token shift: the token before it in the row, whoever's that is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x + 0.3 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))
        return out


class KeepsState(Wrapper):
    """Remembers the token it saw last from one forward to the next."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x if self.last is None else x + 0.3 * self.last)
        self.last = x[:, -1:]
        return out


class SplitsTokens(Wrapper):
    """Calls its linears with half of the tokens at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.tensor_split(2, dim=1) if part.shape[1]], dim=1)


class ReversesTokens(Wrapper):
    """Right alone, but adapters find their tokens at other places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x.flip(1)).flip(1)
        return out


class ForgetsWindow(HonestModel):
    """The window is in the mask alone, which nobody builds for paged attention."""

    def __init__(self, config: HonestConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
            layer.self_attn.config.sliding_window = None


class WrongScale(HonestModel):
    """The scale is right in eager attention alone."""

    def __init__(self, config: HonestConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "eager":
            for layer in self.model.layers:
                layer.self_attn.scaling *= 1.05


class IgnoresPositions(HonestModel):
    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class PositionsFromLongest(HonestModel):
    """Its rotation depends on the longest position in the row, as LongRoPE's does."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None and position_ids.max() > 100:
            position_ids = position_ids * 2
        return super().forward(*args, position_ids=position_ids, **kwargs)


class IgnoresLogitsToKeep(HonestModel):
    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class KeepsOneRow(HonestModel):
    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return super().forward(*args, logits_to_keep=1 if torch.is_tensor(logits_to_keep) else 0, **kwargs)


class DropsKeywords(HonestModel):
    def forward(self, *args: Any, paged: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class SecondRowLeaks(HonestModel):
    """Its logits carry a little of the row's mean."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.mean(dim=1, keepdim=True)
        return output


def with_mlp(wrap: Callable[[nn.Module], nn.Module]) -> type[HonestModel]:
    class Wrapped(HonestModel):
        def __init__(self, config: HonestConfig) -> None:
            super().__init__(config)
            replace_mlp(self, wrap)

    return Wrapped


CHEATS: dict[str, type[HonestModel]] = {
    "reads neighbour": with_mlp(ReadsNeighbour),
    "keeps state": with_mlp(KeepsState),
    "splits tokens": with_mlp(SplitsTokens),
    "reverses tokens": with_mlp(ReversesTokens),
    "forgets window": ForgetsWindow,
    "wrong scale": WrongScale,
    "ignores positions": IgnoresPositions,
    "positions from longest": PositionsFromLongest,
    "ignores logits_to_keep": IgnoresLogitsToKeep,
    "keeps one row": KeepsOneRow,
    "drops keywords": DropsKeywords,
    "row leaks": SecondRowLeaks,
}


def register(model: type[HonestModel], model_type: str) -> HonestConfig:
    """A family of its own under `model_type`, with a small config."""
    config_class = type("CheatConfig", (HonestConfig,), {"model_type": model_type})
    model_class = type(model.__name__, (model,), {"config_class": config_class})
    AutoConfig.register(model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    config: HonestConfig = config_class(**COMMON, sliding_window=8)
    return config


def test_honest_family_passes_by_far() -> None:
    register_attention()
    assert probe_family(register(HonestModel, "honest"), max_position=255).difference < 1e-5


@pytest.mark.parametrize("cheat", sorted(CHEATS))
def test_family_that_cheats_is_refused_by_name(cheat: str) -> None:
    register_attention()
    model_type = "cheat_" + cheat.replace(" ", "_")
    config = register(CHEATS[cheat], model_type)
    named = {"keeps one row": "KeepsOneRow", "drops keywords": "MistralAttention"}.get(cheat, model_type)
    with pytest.raises(BaseRefused, match=named):
        probe_family(config, max_position=255)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "deepseek-v3"])
def test_probe_leaves_config_and_random_state_alone(family: str) -> None:
    register_attention()
    config = FAMILIES[family]()
    before, state = config.to_dict(), torch.random.get_rng_state()
    assert probe_family(config, max_position=255).difference < 1e-4
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
