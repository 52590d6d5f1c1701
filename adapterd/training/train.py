"""One adapter from rows of chat messages: a flat loop over torch and PEFT, in the order it happens."""

import csv
import hashlib
import io
import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterd.adapter import read_adapter
from adapterd.adapter_writer import base_fingerprint, write_adapter
from adapterd.core import BaseSpec
from adapterd.errors import AdapterdError, BaseRefused, InvalidRequest
from adapterd.model.find import find_base
from adapterd.render import Renderer
from adapterd.training.batches import Batch, collate, epoch_batches, micro_batches, num_labels, summed_loss
from adapterd.training.data import Example, encode_rows, read_rows, refuse_leaks, split_validation
from adapterd.training.recipe import Recipe, output_directory

_logger = logging.getLogger(__name__)

_MAX_GRADIENT_NORM = 1.0
_STEPS_BETWEEN_PROGRESS = 20
METRICS_FILE = "training.csv"
_METRICS_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class TrainingDiverged(AdapterdError):
    """The loss or the gradient stopped being a number; nothing was written."""

    status = 400
    code = "training_diverged"


@dataclass
class _Best:
    """The matrices of the step with the lowest validation loss so far."""

    step: int
    loss: float
    weights: dict[str, torch.Tensor]


def train(recipe: Recipe) -> Path:
    """Train one adapter and write its PEFT directory, which is returned.

    Raises InvalidRequest for rows or targets that cannot be trained and TrainingDiverged for a loss that is
    no number; then nothing is written. The same recipe, data, base and seed give the same bytes on one CPU.
    """
    # Rows to tokens: every problem is found before the base is loaded.
    base_directory = find_base(recipe.base)
    fingerprint = base_fingerprint(base_directory)
    renderer = Renderer.load(base_directory)
    rows = read_rows(recipe.data)
    if recipe.heldout is not None:
        refuse_leaks(rows, read_rows(recipe.heldout), path=recipe.heldout)
    if recipe.validation is not None:
        training_rows, validation_rows, validation_path = (
            rows,
            read_rows(recipe.validation),
            recipe.validation,
        )
        refuse_leaks(training_rows, validation_rows, path=validation_path)
    else:
        fraction = recipe.validation_fraction
        training_rows, validation_rows = split_validation(rows, fraction=fraction, seed=recipe.seed)
        validation_path = recipe.data
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    model = _load_frozen_base(base_directory, recipe.dtype, device)
    if base_fingerprint(base_directory) != fingerprint:
        raise BaseRefused(f"the base in {base_directory} was rewritten while it was read; start again")
    max_length = recipe.max_length or int(model.config.get_text_config().max_position_embeddings)
    examples = encode_rows(training_rows, renderer, max_length=max_length, path=recipe.data)
    held_back = encode_rows(validation_rows, renderer, max_length=max_length, path=validation_path)

    # A and B beside the frozen linears, in float32 whatever the base is in.
    targets = _check_targets(model, recipe.target_modules)
    linears = _linears(model)
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(model, config)
    # Inference mode of the modules: the frozen base must not drop out what it will not drop when served.
    peft_model.eval()
    network = peft_model.base_model.model
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}

    # Steps, and the learning rate over them: linear up, then linear down to nothing.
    steps_per_epoch = math.ceil(len(examples) / recipe.batch_size)
    num_steps = math.ceil(recipe.max_epochs * steps_per_epoch)
    num_warmup = round(recipe.warmup_fraction * num_steps)
    steps_per_evaluation = max(1, round(steps_per_epoch / recipe.evaluations_per_epoch))
    optimizer = torch.optim.AdamW(
        trainable.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / num_warmup if step < num_warmup else (num_steps - step) / (num_steps - num_warmup)
        ),
    )
    _logger.info(
        "training %s: %d rows and %d held back, %d parameters, at most %d steps",
        recipe.name,
        len(training_rows),
        len(validation_rows),
        sum(p.numel() for p in trainable.values()),
        num_steps,
    )

    initial_loss, initial_accuracy = _evaluate(network, held_back, renderer.stop_token_id, device)
    history: list[tuple[float | None, ...]] = [(0, None, None, initial_loss, initial_accuracy)]
    best = _Best(0, math.inf, {})
    evaluations_without_gain = 0
    batches: list[list[Example]] = []
    began, num_tokens = time.monotonic(), 0
    for step in range(1, num_steps + 1):
        if not batches:
            epoch = (step - 1) // steps_per_epoch
            batches = epoch_batches(examples, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch)
        chosen = batches.pop(0)

        # One mean over all labels of the step, however it is cut into forward passes.
        labels, loss_sum, right = num_labels(chosen), 0.0, 0
        for part in micro_batches(chosen):
            batch = collate(part, pad_id=renderer.stop_token_id, device=device)
            loss, part_right = summed_loss(network, batch)
            (loss / labels).backward()  # type: ignore[no-untyped-call]
            loss_sum, right = loss_sum + loss.item(), right + part_right
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), _MAX_GRADIENT_NORM)
        if not math.isfinite(loss_sum) or not torch.isfinite(norm):
            raise TrainingDiverged(
                f"training diverged at step {step}: loss {loss_sum / labels}, gradient norm {float(norm)};"
                " lower the learning rate"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        num_tokens += sum(example.num_tokens for example in chosen)

        valid_loss: float | None = None
        valid_accuracy: float | None = None
        if step % steps_per_evaluation == 0 or step == num_steps:
            valid_loss, valid_accuracy = _evaluate(network, held_back, renderer.stop_token_id, device)
            if not math.isfinite(valid_loss):
                raise TrainingDiverged(
                    f"training diverged: the validation loss at step {step} is {valid_loss}"
                )
            if valid_loss < best.loss:
                best = _Best(step, valid_loss, {name: p.detach().clone() for name, p in trainable.items()})
                evaluations_without_gain = 0
            else:
                evaluations_without_gain += 1
        history.append((step, loss_sum / labels, right / labels, valid_loss, valid_accuracy))
        if valid_loss is not None or step % _STEPS_BETWEEN_PROGRESS == 0:
            _logger.info(
                "%s", _progress(history[-1], num_steps, steps_per_epoch, time.monotonic() - began, num_tokens)
            )
        if evaluations_without_gain >= recipe.patience:
            _logger.info("no better validation loss in %d evaluations; stopping", recipe.patience)
            break

    # What is written is the best step, not the last one; and it is read back the way serving reads it.
    tensors = {
        path: (best.weights[f"{path}.lora_A.default.weight"], best.weights[f"{path}.lora_B.default.weight"])
        for path in sorted({name.partition(".lora_")[0] for name in best.weights})
    }
    directory = output_directory(recipe)
    write_adapter(
        directory,
        tensors,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=sorted(config.target_modules),
        base_name=recipe.base,
        base_fingerprint=fingerprint,
        notes={
            "name": recipe.name,
            "data_sha256": hashlib.sha256(recipe.data.read_bytes()).hexdigest(),
            "num_rows": len(training_rows),
            "num_validation_rows": len(validation_rows),
            "seed": recipe.seed,
            "num_steps": len(history) - 1,
            "best_step": best.step,
            "initial_validation_loss": round(initial_loss, 6),
            "validation_loss": round(best.loss, 6),
        },
        extra_files={METRICS_FILE: _metrics(history)},
    )
    _check_round_trip(directory, recipe, tensors, linears, renderer, fingerprint, model)
    _logger.info(
        "%s: validation loss %.4f before, %.4f at step %d; %d tokens in %.0f s",
        recipe.name,
        initial_loss,
        best.loss,
        best.step,
        num_tokens,
        time.monotonic() - began,
    )
    return directory


def _load_frozen_base(directory: Path, dtype: str, device: torch.device) -> Any:
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.requires_grad_(False).to(device)


def _linears(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear, by path."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _check_targets(model: torch.nn.Module, names: Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`. PEFT passes over a name that matches nothing if another does; here it is refused."""
    if list(names) == ["all-linear"]:
        return "all-linear"
    paths = _linears(model)
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths})
            raise InvalidRequest(
                f"target_modules: the base has no linear {name!r}; it has {', '.join(known)} (or use all-linear)",
                param="target_modules",
            )
    return list(names)


@torch.no_grad()
def _evaluate(
    network: torch.nn.Module, examples: Sequence[Example], pad_id: int, device: torch.device
) -> tuple[float, float]:
    """Mean loss in nats and share of first-ranked labels, over all labels of `examples`."""
    loss_sum, right = 0.0, 0
    for part in micro_batches(examples):
        batch: Batch = collate(part, pad_id=pad_id, device=device)
        loss, part_right = summed_loss(network, batch)
        loss_sum, right = loss_sum + loss.item(), right + part_right
    labels = num_labels(examples)
    return loss_sum / labels, right / labels


def _progress(
    last: tuple[float | None, ...], num_steps: int, steps_per_epoch: int, seconds: float, num_tokens: int
) -> str:
    step, loss, _, valid_loss, valid_accuracy = last
    assert step is not None
    validation = (
        "" if valid_loss is None else f", validation {valid_loss:.4f} ({valid_accuracy:.1%} of tokens)"
    )
    left = seconds / step * (num_steps - step)
    return (
        f"step {step:.0f}/{num_steps} (epoch {step / steps_per_epoch:.1f}): loss {loss:.4f}{validation};"
        f" {num_tokens / seconds:,.0f} tokens/s, at most {left:.0f} s left"
    )


def _metrics(history: Sequence[tuple[float | None, ...]]) -> str:
    """OpenAI's columns of a fine-tuning result file."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_METRICS_HEADER)
    for step, *values in history:
        writer.writerow([step, *("" if value is None else f"{value:.6f}" for value in values)])
    return file.getvalue()


def _check_round_trip(
    directory: Path,
    recipe: Recipe,
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    linears: dict[str, tuple[int, int]],
    renderer: Renderer,
    fingerprint: str,
    model: Any,
) -> None:
    """Read the written adapter through the reader that serving uses: it must hold exactly what was trained."""
    spec = BaseSpec(
        name=recipe.base,
        root=recipe.base,
        architecture=type(model).__name__,
        dtype="float32",
        vocab_size=len(renderer.token_bytes),
        max_model_len=recipe.max_length or 0,
        lora_targets={path: shape for path, shape in linears.items() if path in tensors},
        eos_token_ids=renderer.eos_token_ids,
    )
    adapter = read_adapter(
        directory, name=recipe.name, spec=spec, tokenizer=renderer.identity, base_fingerprint=fingerprint
    )
    for matrices in adapter.modules:
        a, b = tensors[matrices.module]
        if not (torch.equal(matrices.a, a.cpu()) and torch.equal(matrices.b, b.cpu())):
            raise AdapterdError(
                f"{directory}: {matrices.module} reads back differently from what was trained"
            )
        if matrices.scale != recipe.alpha / recipe.rank:
            raise AdapterdError(f"{directory}: {matrices.module} reads back with scale {matrices.scale}")
