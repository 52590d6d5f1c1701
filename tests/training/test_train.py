import csv
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from adapterd.adapter import read_adapter
from adapterd.config import TrainSettings, load_settings
from adapterd.errors import InvalidRequest
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.render import Renderer
from adapterd.training.batches import collate, epoch_batches, num_labels
from adapterd.training.data import encode_rows, read_rows, split_validation
from adapterd.training.recipe import output_directory
from adapterd.training.train import METRICS_FILE, TrainingDiverged, train
from tests.tiny import spec_of, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WORDS = ["parcel", "money", "order", "today", "please", "fine", "charged", "back"]
LABELS = ["Shipping", "Refund", "Billing", "Other"]


@dataclass(frozen=True)
class Told:
    base: str
    data: Path
    name: str = "support"
    heldout: Path | None = None
    validation: Path | None = None
    validation_fraction: float = 0.2
    out: Path | None = None
    rank: int = 4
    alpha: float = 8.0
    target_modules: tuple[str, ...] = ("all-linear",)
    max_epochs: float = 2.0
    learning_rate: float = 1e-2
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 4
    max_length: int | None = None
    patience: int = 3
    evaluations_per_epoch: int = 2
    seed: int = 1
    dtype: str = "auto"
    device: str = "cpu"


def write_rows(path: Path, num_rows: int = 24, first: int = 0) -> Path:
    with path.open("w") as file:
        for i in range(first, first + num_rows):
            question = f"{i}: {WORDS[i % 8]} {WORDS[(i * 3 + 1) % 8]}"
            answer = f"Category: {LABELS[i % 4]}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama(directory)
    return directory


@pytest.fixture
def told(base: Path, tmp_path: Path) -> Told:
    return Told(base=str(base), data=write_rows(tmp_path / "train.jsonl"), out=tmp_path / "out" / "support")


def history(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS_FILE).open() as file:
        return list(csv.DictReader(file))


def test_adapter_is_what_peft_loads_and_it_has_learnt(told: Told, base: Path) -> None:
    directory = train(replace(told, max_epochs=6.0, patience=20))
    rows = history(directory)
    assert float(rows[0]["valid_mean_token_accuracy"]) < 0.1
    assert float(rows[-1]["valid_mean_token_accuracy"]) > 0.3  # the random head keeps the loss itself high
    seal = json.loads((directory / SEAL_FILE).read_text())
    assert seal["num_rows"] + seal["num_validation_rows"] == 24

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory).eval()
    renderer = Renderer.load(base)
    _, validation = split_validation(read_rows(told.data), fraction=0.2, seed=told.seed)
    examples = encode_rows(validation, renderer, max_length=256, path=told.data)
    total = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        at = torch.arange(len(example.prompt_ids) - 1, ids.shape[1] - 1)
        total -= float(logprobs[at, ids[0, 1:][at]].sum())
    assert total / num_labels(examples) == pytest.approx(seal["validation_loss"], abs=2e-5)


def test_first_steps_equal_a_plain_loop_over_the_same_batches(told: Told, base: Path) -> None:
    rows = history(train(replace(told, max_epochs=1.0, warmup_fraction=0.5)))
    renderer = Renderer.load(base)
    training, _ = split_validation(read_rows(told.data), fraction=0.2, seed=told.seed)
    examples = encode_rows(training, renderer, max_length=256, path=told.data)
    batches = epoch_batches(examples, batch_size=4, seed=told.seed, epoch=0)

    torch.manual_seed(told.seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    num_steps = len(batches)
    num_warmup = round(0.5 * num_steps)
    for step, chosen in enumerate(batches):
        scale = (
            (step + 1) / num_warmup if step < num_warmup else (num_steps - step) / (num_steps - num_warmup)
        )
        optimizer.param_groups[0]["lr"] = told.learning_rate * scale
        losses = []
        for example in chosen:
            ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
            labels = ids.clone()
            labels[0, : len(example.prompt_ids)] = -100
            losses.append(model(input_ids=ids, labels=labels).loss * len(example.answer_ids))
        loss = torch.stack(losses).sum() / num_labels(chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert float(rows[step + 1]["train_loss"]) == pytest.approx(loss.item(), abs=2e-5)


def test_same_seed_same_bytes_other_seed_other_bytes(told: Told, tmp_path: Path) -> None:
    one = train(replace(told, out=tmp_path / "one"))
    two = train(replace(told, out=tmp_path / "two"))
    other = train(replace(told, out=tmp_path / "other", seed=2))
    for name in (CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE, METRICS_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / WEIGHTS_FILE).read_bytes() != (other / WEIGHTS_FILE).read_bytes()


def test_prompt_and_padding_are_never_labels(told: Told, base: Path) -> None:
    renderer = Renderer.load(base)
    examples = encode_rows(read_rows(told.data), renderer, max_length=256, path=told.data)
    batch = collate(examples, pad_id=renderer.stop_token_id, device=torch.device("cpu"))
    for row, example in enumerate(examples):
        learnt = [label for label in batch.labels[row].tolist() if label >= 0]
        assert renderer.decode(learnt, skip_special_tokens=False).startswith("Category: ")
        assert learnt.count(renderer.stop_token_id) == 1
        assert tuple(learnt) == example.answer_ids


def test_early_stop_keeps_the_best_step(told: Told) -> None:
    # A learning rate this high overshoots, so the validation loss turns within a few evaluations.
    directory = train(replace(told, learning_rate=0.3, max_epochs=40.0, patience=2))
    rows = [row for row in history(directory) if row["valid_loss"]][1:]
    seal = json.loads((directory / SEAL_FILE).read_text())
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    assert seal["best_step"] == int(best["step"])
    assert seal["validation_loss"] == pytest.approx(float(best["valid_loss"]))
    assert int(rows[-1]["step"]) < 40 * 5
    assert rows.index(best) == len(rows) - 3


def test_only_named_targets_are_adapted(told: Told, base: Path) -> None:
    directory = train(replace(told, target_modules=("q_proj", "layers.1.mlp.down_proj"), max_epochs=0.4))
    spec = spec_of(LlamaForCausalLM.from_pretrained(base))
    adapter = read_adapter(directory, name="support", spec=spec, tokenizer=Renderer.load(base).identity)
    assert [matrices.module for matrices in adapter.modules] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {matrices.scale for matrices in adapter.modules} == {2.0}


def test_unknown_target_is_refused_though_another_matches(told: Told) -> None:
    with pytest.raises(InvalidRequest, match=r"no linear 'c_attn'; it has .*q_proj"):
        train(replace(told, target_modules=("q_proj", "c_attn")))


def test_diverging_run_writes_nothing(told: Told) -> None:
    with pytest.raises(TrainingDiverged, match=r"lower the learning rate|validation loss"):
        train(replace(told, learning_rate=1e30, max_epochs=4.0))
    assert told.out is not None
    assert not told.out.exists()


def test_leak_into_heldout_or_validation_is_refused(told: Told, tmp_path: Path) -> None:
    leaky = write_rows(tmp_path / "leaky.jsonl", num_rows=3)
    with pytest.raises(InvalidRequest, match=r"leaky\.jsonl:1: the same prompt is trained on"):
        train(replace(told, heldout=leaky))
    with pytest.raises(InvalidRequest, match=r"leaky\.jsonl:1: the same prompt is trained on"):
        train(replace(told, validation=leaky))
    clean = write_rows(tmp_path / "clean.jsonl", num_rows=6, first=100)
    directory = train(replace(told, validation=clean, heldout=clean, max_epochs=0.2))
    seal = json.loads((directory / SEAL_FILE).read_text())
    assert (seal["num_rows"], seal["num_validation_rows"]) == (24, 6)


def test_row_beyond_max_length_is_named(told: Told) -> None:
    with pytest.raises(InvalidRequest, match=r"train\.jsonl:\d+: \d+ tokens are more than the 10 allowed"):
        train(replace(told, max_length=10))


def test_trained_in_place_beside_its_recipe(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "support"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    recipe = f'name = "support"\nbase = "{base}"\ndata = "train.jsonl"\nrank = 4\nmax_epochs = 0.4\nbatch_size = 4\n'
    (folder / "recipe.toml").write_text(recipe)
    settings = load_settings(TrainSettings, {}, {}, folder / "recipe.toml")
    assert train(settings) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE, METRICS_FILE, "recipe.toml", "train.jsonl"]
    )


def test_folder_of_the_result(told: Told, tmp_path: Path) -> None:
    assert output_directory(told) == tmp_path / "out" / "support"
    beside = replace(told, out=None)
    assert output_directory(beside) == tmp_path / "support"
    assert output_directory(replace(beside, name=tmp_path.name)) == tmp_path


def test_progress_is_logged(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="adapterd.training.train")
    train(replace(told, max_epochs=0.4))
    assert "19 rows and 5 held back" in caplog.text
    assert "tokens/s" in caplog.text
    assert "parcel" not in caplog.text
