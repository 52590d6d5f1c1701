import csv
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaForCausalLM

from adapterd.adapter import read_adapter
from adapterd.config import EngineSettings, TrainSettings, load_settings
from adapterd.daemon import Daemon
from adapterd.errors import AdapterdError, InvalidRequest
from adapterd.evaluation.report import CARD_BEGIN, CARD_END
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.render import Renderer
from adapterd.training.batches import collate, epoch_batches, num_labels
from adapterd.training.card import CARD_FILE
from adapterd.training.curve import CURVE_FILE
from adapterd.training.data import Example, encode_rows, read_rows, split_validation
from adapterd.training.errors import ResumeRefused, RoundTripFailed, TrainingDiverged, TrainingInterrupted
from adapterd.training.history import METRICS_FILE
from adapterd.training.measure import measure_training
from adapterd.training.recipe import output_directory
from adapterd.training.schedule import Schedule
from adapterd.training.train import train
from tests.tiny import spec_of, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WORDS = ["parcel", "money", "order", "today", "please", "fine", "charged", "back"]
LABELS = ["Shipping", "Refund", "Billing", "Other"]


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
def told(base: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "base": str(base),
            "data": write_rows(tmp_path / "train.jsonl"),
            "name": "support",
            "out": tmp_path / "out",
            "validation_fraction": 0.2,
            "rank": 4,
            "epochs": 2.0,
            "learning_rate": 1e-2,
            "warmup_fraction": 0.0,
            "decay_fraction": 1.0,
            "batch_size": 4,
            "seed": 1,
            "device": "cpu",
        }
    )


def but(settings: TrainSettings, **changes: object) -> TrainSettings:
    return TrainSettings.model_validate(settings.model_dump() | changes)


def history(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS_FILE).open() as file:
        return list(csv.DictReader(file))


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


def test_only_named_targets_are_adapted(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, target_modules=("q_proj", "layers.1.mlp.down_proj"), epochs=0.4))
    spec = spec_of(LlamaForCausalLM.from_pretrained(base))
    adapter = read_adapter(directory, name="support", spec=spec, tokenizer=Renderer.load(base).identity)
    assert [matrices.module for matrices in adapter.modules] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert {matrices.scale for matrices in adapter.modules} == {2.0}


def test_unknown_target_is_refused_though_another_matches(told: TrainSettings) -> None:
    with pytest.raises(InvalidRequest, match=r"no linear 'c_attn' that takes adapters; it has .*q_proj"):
        train(but(told, target_modules=("q_proj", "c_attn")))


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
    directory = train(but(told, validation=clean, heldout=clean, epochs=0.2))
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


def test_trained_in_place_beside_its_recipe(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "support"
    folder.mkdir()
    write_rows(folder / "train.jsonl")
    recipe = (
        f'name = "support"\nbase = "{base}"\ndata = "train.jsonl"\nrank = 4\nepochs = 0.4\nbatch_size = 4\n'
    )
    (folder / "recipe.toml").write_text(recipe)
    settings = load_settings(TrainSettings, {}, {}, folder / "recipe.toml")
    written = sorted([CARD_FILE, CONFIG_FILE, CURVE_FILE, WEIGHTS_FILE, SEAL_FILE, METRICS_FILE])
    assert train(settings) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted([*written, "recipe.toml", "train.jsonl"])
    (folder / CARD_FILE).write_text("by hand")
    train(settings)
    assert (folder / CARD_FILE).read_text() == "by hand"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["support"]


def test_folder_of_the_result(told: TrainSettings, tmp_path: Path) -> None:
    assert output_directory(told) == tmp_path / "out" / "support"
    beside = but(told, out=None)
    assert output_directory(beside) == Path("adapters/support")
    assert output_directory(but(beside, name=tmp_path.name)) == tmp_path


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


def test_published_by_one_rename_and_found_by_the_registry(
    told: TrainSettings, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = train(but(told, epochs=0.4))
    assert first == out / "support"
    digest_folder = first.readlink()
    assert digest_folder.parts[:2] == (".versions", "support")

    settings = EngineSettings.model_validate({"base": str(base), "adapters": (out,), "device": "cpu"})
    daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        assert daemon.registry.wait_loaded(30)
        before = daemon.registry.resolve("base:support").digest
        assert digest_folder.name == before
        train(but(told, epochs=0.4, seed=2))
        deadline = time.monotonic() + 30
        while daemon.registry.resolve_waiting("base:support", 30).digest == before:
            assert time.monotonic() < deadline, "the running registry did not pick up the new version"
            time.sleep(0.05)
        assert daemon.registry.resolve_waiting("base:support", 30).digest == first.readlink().name
    finally:
        daemon.registry.stop()
    assert sorted(path.name for path in out.iterdir()) == [".versions", "support"]
    assert len(list((out / ".versions" / "support").iterdir())) == 2


def test_a_folder_of_somebody_elses_is_refused_before_any_work(told: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "out" / "support").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="is a folder or file of its own"):
        train(told)


def test_round_trip_is_proven_and_kept(told: TrainSettings) -> None:
    directory = train(told)
    proof = json.loads((directory / SEAL_FILE).read_text())["round_trip"]
    assert proof["num_rows"] == 5
    assert proof["largest_difference"] < 1e-4
    assert proof["largest_effect"] > 0.01
    assert proof["served_loss"] == pytest.approx(proof["trained_loss"], abs=1e-4)
    card = (directory / CARD_FILE).read_text()
    assert "largest difference of a log probability" in card
    assert card.count(CARD_BEGIN) == card.count(CARD_END) == 1
    assert f"![loss by step]({CURVE_FILE})" in card


def test_an_adapter_without_effect_is_not_published(told: TrainSettings) -> None:
    with pytest.raises(RoundTripFailed, match="changes nothing"):
        train(but(told, learning_rate=1e-30, epochs=0.4))
    assert told.out is not None
    assert not (told.out / "support").exists()


def test_rslora_is_folded_into_alpha(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, use_rslora=True, rank=16, alpha=8.0, epochs=0.4))
    config = json.loads((directory / CONFIG_FILE).read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (32.0, False)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)
    assert loaded.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 8 / 16**0.5


def test_dora_is_trained_and_served_as_it_was_trained(told: TrainSettings, base: Path) -> None:
    """The round trip in `train` compares what a fresh engine serves with what the trainer computed."""
    directory = train(but(told, use_dora=True, epochs=0.4))
    assert json.loads((directory / CONFIG_FILE).read_text())["use_dora"] is True
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        assert any(name.endswith("lora_magnitude_vector") for name in file.keys())  # noqa: SIM118
    assert json.loads((directory / SEAL_FILE).read_text())["round_trip"]["largest_difference"] < 1e-3
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)


def test_warm_start_goes_on_from_an_adapter(told: TrainSettings) -> None:
    first = train(told)
    ended = json.loads((first / SEAL_FILE).read_text())["validation_loss"]
    more = but(told, name="more", warm_start=first, rank=None)
    second = train(more)
    seal = json.loads((second / SEAL_FILE).read_text())
    assert seal["initial_validation_loss"] == pytest.approx(ended, abs=1e-5)
    assert json.loads((second / CONFIG_FILE).read_text())["r"] == 4
    with pytest.raises(InvalidRequest, match=r"rank=8 cannot be changed with --warm-start: .* 4 stays"):
        train(but(more, rank=8))
    with pytest.raises(InvalidRequest, match="target_modules cannot be changed"):
        train(but(more, target_modules=("q_proj",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "bnb-4bit"}, "--quantization bnb-4bit needs a CUDA device"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"warm_start": Path("nowhere")}, "nowhere cannot be resolved"),
        ({"base": "nowhere"}, "no such directory"),
    ],
)
def test_what_cannot_be_had_here_is_refused_by_name(
    changes: dict[str, object], message: str, told: TrainSettings
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(AdapterdError, match=message):
        train(but(told, **changes))
    assert told.out is not None
    assert not told.out.exists()


def test_bfloat16_keeps_a_and_b_in_float32(told: TrainSettings, base: Path) -> None:
    directory = train(but(told, dtype="bfloat16", epochs=1.0))
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert json.loads((directory / SEAL_FILE).read_text())["round_trip"]["mean_difference"] < 0.05


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
