"""A base that cannot tell its end token from others is refused; an adapter that has not learnt to end is named."""

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from adapterd.config import TrainSettings
from adapterd.errors import BaseRefused
from adapterd.render import Renderer
from adapterd.training.stop_token import check_stop_token, warn_if_endless
from adapterd.training.train import train
from tests.tiny import byte_level_tokenizer, tiny_llama
from tests.training.runs import write_rows


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(byte_level_tokenizer(), eos_token_ids=frozenset({2}))


def head(vocab_size: int = 400, *, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(16, vocab_size, bias=False)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_an_end_token_with_the_row_of_unused_ones_is_refused(renderer: Renderer, scale: float) -> None:
    linear = head()
    with torch.no_grad():
        linear.weight[2] *= scale
        linear.weight[[5, 390]] = linear.weight[2] * (1 + 2**-12)
    with pytest.raises(BaseRefused, match=r"not learnt '<\|im_end\|>', .* the same row for 2 other tokens"):
        check_stop_token(linear, renderer)


def test_other_tokens_may_be_alike_and_a_near_row_is_another(renderer: Renderer) -> None:
    linear = head()
    with torch.no_grad():
        linear.weight[5] = linear.weight[6]
        linear.weight[7] = linear.weight[2] * 1.01
    check_stop_token(linear, renderer)


def test_a_base_that_could_never_end_is_refused_before_any_step(tmp_path: Path) -> None:
    model: LlamaForCausalLM = tiny_llama(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[3]
    model.save_pretrained(tmp_path / "base")
    recipe = {"base": str(tmp_path / "base"), "name": "support", "out": tmp_path / "out", "device": "cpu"}
    rows = write_rows(tmp_path / "train.jsonl")
    with pytest.raises(BaseRefused, match="no adapter could learn to end"):
        train(TrainSettings.model_validate(recipe | {"data": rows}))
    assert not (tmp_path / "out" / "support").exists()


def test_answers_that_would_go_on_are_counted(renderer: Renderer, caplog: pytest.LogCaptureFixture) -> None:
    ends, goes_on = (torch.tensor([-9.0, math.log(p)]) for p in (0.9, 0.1))
    with caplog.at_level(logging.WARNING):
        warn_if_endless([ends, ends, goes_on], renderer)
        assert caplog.text == ""
        warn_if_endless([ends, goes_on, goes_on], renderer)
    assert "only 1 of 3 held-back answers would end with '<|im_end|>'" in caplog.text
