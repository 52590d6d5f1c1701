"""A run: what is learnt from which rows in what order, and how it ends."""

import csv
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from adapterd.config import TrainSettings
from adapterd.errors import InvalidRequest
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.render import Renderer
from adapterd.training.batches import collate, epoch_batches, num_labels
from adapterd.training.curve import CURVE_FILE
from adapterd.training.data import Example, encode_rows, read_rows, split_validation
from adapterd.training.errors import ResumeRefused, TrainingDiverged, TrainingInterrupted
from adapterd.training.history import METRICS_FILE
from adapterd.training.measure import measure_training
from adapterd.training.schedule import Schedule
from adapterd.training.train import train
from tests.training.runs import but, history, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_adapter_is_what_peft_loads_and_it_has_learnt(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, epochs=6.0, patience=20))
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


def test_a_table_with_columns_of_other_names_gives_the_adapter_that_chat_rows_give(
    told: TrainSettings, tmp_path: Path
) -> None:
    table = tmp_path / "tickets.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "reply"])
        for number, row in enumerate(read_rows(told.data)):
            writer.writerow([number, row.prompt_text, row.answer])
    by_rows = train(but(told, epochs=0.4, out=tmp_path / "rows"))
    mapped = but(told, epochs=0.4, data=table, map=("prompt=question", "completion=reply"))
    by_table = train(but(mapped, out=tmp_path / "table"))
    assert (by_table / WEIGHTS_FILE).read_bytes() == (by_rows / WEIGHTS_FILE).read_bytes()
    with pytest.raises(InvalidRequest, match=r"tickets\.csv:1: no column 'prompt'"):
        train(but(mapped, map=()))


def test_first_steps_equal_a_plain_loop_over_the_same_batches(told: TrainSettings, base: Path) -> None:
    rows = history(train(but(told, epochs=1.0, warmup_fraction=0.5)))
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


def test_same_seed_same_bytes_other_seed_other_bytes(told: TrainSettings, tmp_path: Path) -> None:
    one = train(but(told, out=tmp_path / "one"))
    two = train(but(told, out=tmp_path / "two"))
    other = train(but(told, out=tmp_path / "other", seed=2))
    for name in (CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE, METRICS_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / WEIGHTS_FILE).read_bytes() != (other / WEIGHTS_FILE).read_bytes()


def test_prompt_and_padding_are_never_labels(told: TrainSettings, base: Path) -> None:
    renderer = Renderer.load(base)
    examples = encode_rows(read_rows(told.data), renderer, max_length=256, path=told.data)
    batch = collate(examples, pad_id=renderer.stop_token_id, device=torch.device("cpu"))
    for row, example in enumerate(examples):
        learnt = [label for label in batch.labels[row].tolist() if label >= 0]
        assert renderer.decode(learnt, skip_special_tokens=False).startswith("Category: ")
        assert learnt.count(renderer.stop_token_id) == 1
        assert tuple(learnt) == example.answer_ids


def test_early_stop_keeps_the_best_step(told: TrainSettings) -> None:
    # A learning rate this high overshoots, so the validation loss turns within a few evaluations.
    directory = train(but(told, learning_rate=0.3, epochs=40.0, patience=2, decay_fraction=0.2))
    rows = [row for row in history(directory) if row["valid_loss"]][1:]
    seal = json.loads((directory / SEAL_FILE).read_text())
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    assert seal["best_step"] == int(best["step"])
    assert seal["validation_loss"] == pytest.approx(float(best["valid_loss"]))
    assert int(rows[-1]["step"]) < 40 * 5


def test_diverging_run_writes_nothing(told: TrainSettings) -> None:
    with pytest.raises(TrainingDiverged, match=r"lower the learning rate|validation loss"):
        train(but(told, learning_rate=1e30, epochs=4.0))
    assert told.out is not None
    assert not told.out.exists()


def test_leak_into_heldout_or_validation_is_refused(told: TrainSettings, tmp_path: Path) -> None:
    leaky = write_rows(tmp_path / "leaky.jsonl", num_rows=3)
    with pytest.raises(InvalidRequest, match=r"leaky\.jsonl:1: the same prompt is trained on"):
        train(but(told, heldout=leaky))
    with pytest.raises(InvalidRequest, match=r"leaky\.jsonl:1: the same prompt is trained on"):
        train(but(told, validation=leaky))
    clean = write_rows(tmp_path / "clean.jsonl", num_rows=6, first=100)
    with pytest.raises(
        InvalidRequest, match=r"clean\.jsonl:1: the same prompt is validated on, in line 1 of"
    ):
        train(but(told, validation=clean, heldout=clean))
    apart = write_rows(tmp_path / "apart.jsonl", num_rows=6, first=200)
    directory = train(but(told, validation=clean, heldout=apart, epochs=0.2))
    seal = json.loads((directory / SEAL_FILE).read_text())
    assert (seal["num_rows"], seal["num_validation_rows"]) == (24, 6)


def test_row_beyond_max_length_is_named(told: TrainSettings) -> None:
    with pytest.raises(InvalidRequest, match=r"train\.jsonl:\d+: \d+ tokens are more than the 10 allowed"):
        train(but(told, max_length=10))


def test_rows_that_are_too_long_are_left_out_if_told_so(
    told: TrainSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with told.data.open("a") as file:
        messages = [{"role": "user", "content": "long " * 400}, {"role": "assistant", "content": "x"}]
        file.write(json.dumps({"messages": messages}) + "\n")
    directory = train(but(told, on_too_long="drop", epochs=0.4))
    seal = json.loads((directory / SEAL_FILE).read_text())
    assert seal["num_rows"] + seal["num_validation_rows"] == 24
    assert "left out: lines 25" in caplog.text


def test_progress_is_logged(told: TrainSettings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="adapterd.training")
    train(but(told, epochs=0.4))
    assert "19 rows and 5 held back" in caplog.text
    assert "tokens/s" in caplog.text
    assert "parcel" not in caplog.text


def test_per_step_loss_is_that_of_transformers_trainer(
    told: TrainSettings, base: Path, tmp_path: Path
) -> None:
    """The oracle: Trainer over the same rows in the same order, AdamW, clipping, our schedule as its own."""
    rows = history(train(but(told, epochs=2.0, warmup_fraction=0.2, decay_fraction=0.3, weight_decay=0.01)))
    renderer = Renderer.load(base)
    training, _ = split_validation(read_rows(told.data), fraction=0.2, seed=told.seed)
    examples = encode_rows(training, renderer, max_length=256, path=told.data)
    batches = [
        batch
        for epoch in range(2)
        for batch in epoch_batches(examples, batch_size=4, seed=told.seed, epoch=epoch)
    ]
    num_steps = len(batches)
    schedule = Schedule(num_steps, round(0.2 * num_steps), 0.3, patience=99)

    torch.manual_seed(told.seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=told.learning_rate, weight_decay=0.01)

    def padded(batch: list[list[Example]]) -> dict[str, torch.Tensor]:
        (examples,) = batch
        length = max(example.num_tokens for example in examples)
        ids = torch.full((len(examples), length), 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            tokens = torch.tensor([*example.prompt_ids, *example.answer_ids])
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, len(example.prompt_ids) : len(tokens)] = tokens[len(example.prompt_ids) :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "oracle"),
            per_device_train_batch_size=1,
            max_steps=num_steps,
            logging_steps=1,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=batches,
        data_collator=padded,
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: schedule.factor(min(step + 1, num_steps))
            ),
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == num_steps == 10
    for step, loss in enumerate(losses, 1):
        assert float(rows[step]["train_loss"]) == pytest.approx(loss, abs=1e-5)


def test_packed_and_padded_runs_have_the_same_losses(told: TrainSettings) -> None:
    packed = history(train(but(told, packing="on")))
    padded = history(train(but(told, packing="off", name="padded")))
    for one, two in zip(packed, padded, strict=True):
        for column in ("train_loss", "valid_loss"):
            assert one[column] == two[column] == "" or float(one[column]) == pytest.approx(
                float(two[column]), abs=2e-5
            )


def test_small_forwards_and_recomputed_activations_change_no_loss(told: TrainSettings) -> None:
    whole = history(train(but(told, epochs=1.0)))
    parts = history(
        train(but(told, epochs=1.0, micro_batch_tokens=40, gradient_checkpointing="on", name="parts"))
    )
    for one, two in zip(whole, parts, strict=True):
        assert one["train_loss"] == two["train_loss"] == "" or float(one["train_loss"]) == pytest.approx(
            float(two["train_loss"]), abs=2e-5
        )


def test_stopped_run_goes_on_to_the_same_bytes(told: TrainSettings, tmp_path: Path) -> None:
    whole = train(told)
    interrupted = but(told, out=tmp_path / "interrupted")
    for _ in range(2):
        stop = threading.Event()
        stop.set()
        with pytest.raises(TrainingInterrupted, match="stopped after step 0"):
            train(interrupted, stop=stop)
    assert not (tmp_path / "interrupted" / "support").exists()
    with pytest.raises(ResumeRefused, match=r"learning_rate was 0\.01 and is 0\.02"):
        train(but(interrupted, learning_rate=0.02))
    resumed = train(interrupted)
    for name in (WEIGHTS_FILE, SEAL_FILE, METRICS_FILE, CURVE_FILE):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "interrupted").iterdir()) == [".versions", "support"]


def test_no_resume_starts_afresh(told: TrainSettings, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainingInterrupted):
        train(told, stop=stop)
    changed = but(told, learning_rate=0.02, resume=False)
    directory = train(changed)
    assert json.loads((directory / SEAL_FILE).read_text())["learning_rate"] == 0.02


def test_measured_steps_say_what_training_costs(told: TrainSettings, base: Path) -> None:
    renderer = Renderer.load(base)
    examples = encode_rows(read_rows(told.data), renderer, max_length=256, path=told.data)
    measured = measure_training(told, renderer, examples, max_seconds=0.01)
    assert measured.tokens_per_second > 0
    assert measured.peak_bytes > 2**20
    assert told.out is not None
    assert not told.out.exists()
