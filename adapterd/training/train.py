"""One adapter from rows of chat messages: a flat loop over torch and PEFT, in the order it happens."""

import gc
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from adapterd.model.base_config import exact_context, read_config
from adapterd.model.find import find_base
from adapterd.render import Renderer
from adapterd.training.batches import epoch_batches
from adapterd.training.card import eval_command
from adapterd.training.checkpoints import Checkpoints, only_run
from adapterd.training.data import Example
from adapterd.training.dataset import Dataset, read_dataset
from adapterd.training.errors import TrainingDiverged, TrainingInterrupted
from adapterd.training.history import StepRecord, TensorBoardLog, check_tensorboard
from adapterd.training.memory import fit_memory
from adapterd.training.metrics import TrainingMetrics
from adapterd.training.metrics_server import LOOPBACK, metrics_served
from adapterd.training.network import build_network
from adapterd.training.plan import make_plan
from adapterd.training.progress import Progress, lines_above_bar
from adapterd.training.publish import check_target, publish
from adapterd.training.recipe import Recipe, output_directory, run_directory
from adapterd.training.result import Result, write_result, write_weights
from adapterd.training.round_trip import NUM_ROWS, check_servable, label_logprobs, prove_round_trip
from adapterd.training.rules import MAX_GRADIENT_NORM
from adapterd.training.schedule import Schedule
from adapterd.training.state import TrainingState
from adapterd.training.stop_token import warn_if_endless

_logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, stop: threading.Event | None = None) -> Path:
    """Train one adapter and publish its PEFT directory, whose path is returned.

    `stop`, once set, ends the run after the step at hand with a checkpoint. Raises InvalidRequest for rows or
    settings that cannot be trained, TrainingDiverged for a loss that is no number, TrainingInterrupted,
    ResumeRefused, RoundTripFailed: then nothing is published. The same recipe, rows, base and seed give the same
    bytes on one CPU, however often the run was killed and resumed.
    """
    target = output_directory(recipe)
    in_place = target.is_dir() and target.resolve() == recipe.data.resolve().parent
    check_target(target, in_place=in_place)
    check_tensorboard(recipe.tensorboard)
    metrics = TrainingMetrics(recipe.name, recipe.base, checkpoint_seconds=recipe.checkpoint_seconds)
    with (
        metrics_served(metrics, recipe.metrics_host or LOOPBACK, recipe.metrics_port),
        only_run(run_directory(recipe)) as directory,
        lines_above_bar(),
    ):
        checkpoints = directory / "checkpoints"
        try:
            learnt = _learn(recipe, checkpoints, stop or threading.Event(), metrics)
        except TrainingDiverged:
            shutil.rmtree(checkpoints, ignore_errors=True)  # going on from there would end there again
            raise
        metrics.enter("proving")
        # The fresh engine needs the memory that the trainer's base took; what torch keeps of it for itself counts
        # as taken.
        gc.collect()
        torch.cuda.empty_cache()

        # The proof: served as a daemon serves it, the adapter answers as it did here. Only then is it published.
        staged = directory / recipe.name
        shutil.rmtree(staged, ignore_errors=True)
        write_result(staged, learnt.result)
        proof = prove_round_trip(
            staged,
            name=recipe.name,
            base=recipe.base,
            dtype=learnt.result.dtype,
            device=learnt.result.device,
            examples=learnt.held_back,
            trained=learnt.logprobs,
            quantization=learnt.result.quantization,
            rank=learnt.result.rank,
        )
        _logger.info("round trip: %s", proof)
        write_result(staged, learnt.result, proof)
        publish(staged, target, digest=proof.digest, in_place=in_place)
        shutil.rmtree(checkpoints, ignore_errors=True)
    learnt.result.announce(_logger)
    if not in_place:
        _logger.info("measure it: %s", eval_command(str(target), recipe, full_paths=True))
    return target


@dataclass(frozen=True)
class _Learnt:
    """What is left of the training when its network is gone: the adapter, and what it said of some held-back rows."""

    result: Result
    held_back: list[Example]
    logprobs: list[torch.Tensor]


def _learn(
    recipe: Recipe, checkpoint_directory: Path, stop: threading.Event, metrics: TrainingMetrics
) -> _Learnt:
    # Rows to tokens: every problem is found before the base is loaded.
    base = find_base(recipe.base)
    renderer = Renderer.load(base)
    context = exact_context(read_config(base, recipe.base), recipe.max_length, flag="--max-length")
    dataset = read_dataset(recipe, renderer, max_length=context)

    # The frozen base with A and B beside its linears; whether it could be served is asked before it is trained.
    network = build_network(recipe, renderer)
    fit_memory(network, recipe, dataset.longest)
    plan = make_plan(recipe, network, dataset)
    result = Result.of(recipe, network, plan, dataset, renderer)
    check_servable(network, renderer, lambda folder, weights: write_weights(folder, result, network, weights))
    optimizer = torch.optim.AdamW(network.trainable.values(), lr=0.0, weight_decay=recipe.weight_decay)
    schedule = Schedule(plan.max_steps, plan.num_warmup, recipe.decay_fraction, recipe.patience)
    state = TrainingState(network.trainable, optimizer, schedule)
    plan.announce(_logger, network, dataset)

    # Where an earlier run of the same name, rows, settings and base was ended, or step 0.
    checkpoints = Checkpoints(checkpoint_directory, plan.identity(recipe, network, dataset))
    if not recipe.resume:
        checkpoints.clear()
    snapshot = checkpoints.load()
    if snapshot is not None:
        state.restore(snapshot)
        _logger.info("going on after step %d", state.step)
    else:
        loss, accuracy = network.evaluate(dataset.validation)
        _check_finite("the validation loss before any step", loss)
        state.history.append(StepRecord(0, valid_loss=loss, valid_accuracy=accuracy))
    epochs = _Epochs(dataset, recipe)
    metrics.begin(state.history, last_step=schedule.decay_end)
    last_checkpoint = time.monotonic()
    with (
        closing(TensorBoardLog(recipe.tensorboard, first_step=state.step + 1)) as tensorboard,
        closing(Progress(state.step, plan.max_steps, plan.steps_per_epoch)) as progress,
    ):
        while not schedule.is_done(state.step):
            if stop.is_set():
                _interrupt(checkpoints, state)
            step = state.step + 1
            examples = epochs.batch(step)
            rate = plan.learning_rate * schedule.factor(step)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss, accuracy = network.gradient(examples)
            norm = torch.nn.utils.clip_grad_norm_(network.trainable.values(), MAX_GRADIENT_NORM)
            _check_finite(f"the loss of step {step}", loss)
            _check_finite(f"the gradient's norm in step {step}", float(norm))
            optimizer.step()
            optimizer.zero_grad()

            record = StepRecord(step, loss, accuracy)
            if step % plan.steps_per_evaluation == 0 or step == schedule.decay_end:
                record = StepRecord(step, loss, accuracy, *network.evaluate(dataset.validation))
                assert record.valid_loss is not None
                _check_finite(f"the validation loss after step {step}", record.valid_loss)
                if schedule.observe(step, record.valid_loss):
                    state.keep_as_best()
                if schedule.flat_at == step:
                    _logger.info(
                        "the validation loss is flat: decaying from step %d to %d", step, schedule.decay_end
                    )
            state.step = step
            state.history.append(record)
            tensorboard.add(record, rate)
            num_tokens = sum(example.num_tokens for example in examples)
            progress.step(record, num_tokens=num_tokens, last_step=schedule.decay_end)
            metrics.step(record, learning_rate=rate, num_tokens=num_tokens, last_step=schedule.decay_end)
            if time.monotonic() - last_checkpoint >= recipe.checkpoint_seconds:
                if checkpoints.save(state.step, state.snapshot()):
                    metrics.saved()
                last_checkpoint = time.monotonic()

    # What is kept is the best step, not the last one.
    _put(state.best, network.trainable)
    held_back = dataset.validation[:NUM_ROWS]
    logprobs = label_logprobs(network, held_back)
    warn_if_endless(logprobs, renderer)
    return _Learnt(result.finished(state, network, progress), held_back, logprobs)


class _Epochs:
    """Which rows make a step: a function of the seed and the step's number alone."""

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self._examples = dataset.training
        self._recipe = recipe
        self._epoch = -1
        self._batches: list[list[Example]] = []

    def batch(self, step: int) -> list[Example]:
        """Rows of `step`, the first being 1."""
        size = self._recipe.batch_size
        epoch, index = divmod(step - 1, math.ceil(len(self._examples) / size))
        if epoch != self._epoch:
            self._batches = epoch_batches(
                self._examples, batch_size=size, seed=self._recipe.seed, epoch=epoch
            )
            self._epoch = epoch
        return self._batches[index]


@torch.no_grad()
def _put(weights: Mapping[str, torch.Tensor], trainable: Mapping[str, torch.nn.Parameter]) -> None:
    for name, tensor in weights.items():
        trainable[name].copy_(tensor)


def _interrupt(checkpoints: Checkpoints, state: TrainingState) -> None:
    if checkpoints.save(state.step, state.snapshot()):
        raise TrainingInterrupted(
            f"stopped after step {state.step}; the same command goes on from there (--no-resume starts afresh)"
        )
    raise TrainingInterrupted(
        f"stopped after step {state.step}, of which no checkpoint could be written; the same command goes on from"
        " the one before it, if there is one"
    )


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(f"training diverged: {what} is {value}; lower the learning rate")
