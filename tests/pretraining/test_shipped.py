"""The shipped base is the one that was measured, and is within the promised size."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterd
from pretraining import manifest

MINI = Path(adapterd.__file__).parent / "mini"


def test_shipped_files_have_the_recorded_hashes() -> None:
    assert manifest.hashes(MINI) == json.loads((MINI / manifest.NAME).read_text())


def test_shipped_model_is_small_and_bfloat16() -> None:
    assert sum(path.stat().st_size for path in MINI.iterdir()) < 20_000_000
    model = AutoModelForCausalLM.from_pretrained(MINI)
    assert model.dtype == torch.bfloat16
    assert 3_000_000 <= model.num_parameters() <= 9_000_000


def test_shipped_tokenizer_has_the_stated_marks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 1024
    assert len(tokenizer) == 2048
