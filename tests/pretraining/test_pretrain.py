import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretraining import pretrain
from pretraining.recipe import Recipe

TINY = Recipe(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    tokenizer_chats=300,
    induction_rows=4,
    row_count=2,
    steps_per_block=5,
    gate_steps=5,
    copy_gate=0.0,  # the gates open at once: this run is too short to learn
    probe_steps=10_000,
    log_steps=5,
    warmup_steps=5,
)


def arguments(folder: Path, tokens: int, *more: str) -> argparse.Namespace:
    return pretrain.parse(
        ["--tokens", str(tokens), "--out", str(folder / "out"), "--work", str(folder / "work"), *more]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pretrain.Progress]:
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, pretrain.train(arguments(folder, 24_000), TINY)


def test_loss_falls_and_all_phases_run(finished: tuple[Path, pretrain.Progress]) -> None:
    _, progress = finished
    losses = [entry["loss"] for entry in progress.record if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert {entry["phase"] for entry in progress.record} == {"words", "drills", "mixture", "decay"}


def test_what_is_saved_loads_and_answers(finished: tuple[Path, pretrain.Progress]) -> None:
    out = finished[0] / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3"
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_a_resumed_run_goes_on_where_it_stopped(
    tmp_path: Path, finished: tuple[Path, pretrain.Progress]
) -> None:
    full = finished[1]
    stopped = pretrain.train(arguments(tmp_path, 24_000, "--stop-after", "8000"), TINY)
    before = {path.name: path.read_bytes() for path in (tmp_path / "work" / "tokenizer").iterdir()}
    resumed = pretrain.train(arguments(tmp_path, 24_000, "--resume"), TINY)
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    assert 8000 <= stopped.tokens < full.tokens
    assert resumed.tokens == full.tokens
    assert resumed.loss == pytest.approx(full.loss, rel=1e-3)


def test_the_log_is_the_record(finished: tuple[Path, pretrain.Progress]) -> None:
    folder, progress = finished
    lines = (folder / "work" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == progress.record


def test_a_missed_gate_ends_at_the_cap(tmp_path: Path) -> None:
    progress = pretrain.train(arguments(tmp_path, 12_000), replace(TINY, copy_gate=1.1, induction_cap=0.2))
    assert progress.phase == "decay"
