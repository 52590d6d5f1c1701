"""The benchmark's base and adapters are real ones: the daemon's own readers take them."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from adapterd.adapter import read_adapter
from adapterd.core import BaseSpec
from adapterd.render import Renderer
from bench.models import NUM_RARE_TOKENS, SHAPES, lora_linears, main, make_tokenizer
from bench.workload import single_token_words, text_prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    assert main(["--out", str(out), "--shape", "tiny", "--adapters", "2", "--ranks", "8,16"]) == 0
    return out


def test_the_tokenizer_has_exactly_as_many_entries_as_the_model() -> None:
    assert len(make_tokenizer(32_000)) == 32_000


def test_a_word_is_a_token(made: Path) -> None:
    words = single_token_words(made / "base" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(made / "base" / "tokenizer.json"))
    first = len(tokenizer.encode("Hello").ids)
    assert len(tokenizer.encode(text_prompt(50, words, "a")).ids) == first + 50


def test_the_renderer_takes_the_tokenizer(made: Path) -> None:
    renderer = Renderer.load(made / "base")
    assert renderer.has_chat_template
    assert renderer.stop_token_id == 2


def test_adapters_are_read_with_the_ranks_asked_for(made: Path) -> None:
    config = SHAPES["tiny"]()
    spec = BaseSpec(
        name="tiny",
        root="tiny",
        architecture="Qwen3ForCausalLM",
        dtype="bfloat16",
        vocab_size=config.vocab_size,
        max_model_len=2048,
        lora_targets=lora_linears(config),
        eos_token_ids=frozenset([2]),
    )
    renderer = Renderer.load(made / "base")
    for index, rank in enumerate((8, 16)):
        name = f"adapter-{index:02}"
        adapter = read_adapter(made / "adapters" / name, name=name, spec=spec, tokenizer=renderer.identity)
        assert {matrices.rank for matrices in adapter.modules} == {rank}
        assert len(adapter.modules) == len(spec.lora_targets)


@torch.inference_mode()
def test_greedy_decoding_chooses_words_alone(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    ids = torch.randint(NUM_RARE_TOKENS, 2000, (4, 16), generator=torch.Generator().manual_seed(0))
    assert (model(ids).logits.argmax(-1) >= NUM_RARE_TOKENS).all()


def test_the_shape_of_the_figures_is_946_megabytes_and_an_adapter_of_rank_16_is_20() -> None:
    config = SHAPES["qwen3-0.6b"]()
    linears = lora_linears(config)
    weights = sum(d_out * d_in for d_out, d_in in linears.values()) + config.vocab_size * config.hidden_size
    assert round(2 * weights / 1e6) == 946
    assert round(sum(2 * 16 * (d_out + d_in) for d_out, d_in in linears.values()) / 1e6, 1) == 20.2
