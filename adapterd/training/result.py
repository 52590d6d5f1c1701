"""What a run leaves behind: the PEFT directory with its seal, curve, figures and card."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapterd.adapter_writer import write_adapter
from adapterd.render import Renderer
from adapterd.training.card import CARD_FILE, eval_command, model_card
from adapterd.training.curve import CURVE_FILE, loss_curve
from adapterd.training.dataset import Dataset
from adapterd.training.errors import TrainingDiverged
from adapterd.training.history import METRICS_FILE, StepRecord, as_csv
from adapterd.training.network import Network
from adapterd.training.plan import Plan
from adapterd.training.progress import Progress
from adapterd.training.recipe import Recipe
from adapterd.training.round_trip import RoundTrip
from adapterd.training.state import TrainingState


@dataclass(frozen=True)
class Result:
    """What is known of an adapter, without the network that it was trained in."""

    name: str
    base: str
    revision: str | None
    fingerprint: str
    rank: int
    scale: float
    target_modules: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    quantization: str
    facts: tuple[tuple[str, str], ...]
    settings: Mapping[str, object]
    notes: Mapping[str, object]
    measured_by: str
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    history: tuple[StepRecord, ...] = ()
    best_step: int = 0
    best_loss: float = math.inf
    flat_at: int | None = None
    num_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @classmethod
    def of(
        cls, recipe: Recipe, network: Network, plan: Plan, dataset: Dataset, renderer: Renderer
    ) -> "Result":
        """What is known before the first step."""
        revision = _hub_revision(network.directory)
        settings: dict[str, object] = {
            "rank": network.config.r,
            "scale": f"{network.scale:g}",
            "use_rslora": recipe.use_rslora,
            "use_dora": recipe.use_dora,
            "warm_start": recipe.warm_start,
            "target_modules": ", ".join(sorted(network.config.target_modules)),
            "learning_rate": plan.learning_rate,
            "epochs (at most)": f"{plan.epochs:g}",
            "warmup_fraction": recipe.warmup_fraction,
            "decay_fraction": recipe.decay_fraction,
            "weight_decay": recipe.weight_decay,
            "batch_size": recipe.batch_size,
            "patience": recipe.patience,
            "quantization": recipe.quantization,
            "dtype": str(network.dtype).removeprefix("torch."),
            "seed": recipe.seed,
        }
        return cls(
            name=recipe.name,
            base=recipe.base,
            revision=revision,
            fingerprint=network.fingerprint,
            rank=network.config.r,
            scale=network.scale,
            target_modules=tuple(sorted(network.config.target_modules)),
            dtype=network.dtype,
            device=network.device,
            quantization=network.quantization,
            facts=(
                ("base", f"`{recipe.base}`, fingerprint `{network.fingerprint[:12]}`"),
                ("base's revision", f"`{revision}`" if revision else "none: a local directory"),
                ("chat template", f"`{renderer.template_sha256[:12]}`, the base's own"),
                ("rows", f"{dataset.num_rows} of `{recipe.data.name}`, sha256 `{dataset.data_sha256[:12]}`"),
                ("rows held back to stop by", f"{dataset.num_validation_rows}"),
                (
                    "trainable",
                    f"{network.num_trainable:,} of {network.num_base_parameters:,} parameters"
                    f" ({network.num_trainable / network.num_base_parameters:.2%})",
                ),
            ),
            settings=settings,
            measured_by=eval_command("FOLDER", recipe, full_paths=False),
            notes={
                "name": recipe.name,
                "base_revision": revision,
                "template_sha256": renderer.template_sha256,
                "data_sha256": dataset.data_sha256,
                "num_rows": dataset.num_rows,
                "num_validation_rows": dataset.num_validation_rows,
                "seed": recipe.seed,
                # By which `adapterd eval` finds the rows that were held back, if they have no file of their own.
                **({} if recipe.validation else {"split": _split(recipe, dataset)}),
                "learning_rate": plan.learning_rate,
                "use_rslora": recipe.use_rslora,
                "trained_on": network.quantization
                if network.quantization != "none"
                else str(network.dtype).removeprefix("torch."),
            },
        )

    def finished(self, state: TrainingState, network: Network, progress: Progress) -> "Result":
        """With the matrices of the best step, and what it cost."""
        schedule = state.schedule
        return replace(
            self,
            matrices=network.matrices(state.best),
            magnitudes=network.magnitudes(state.best),
            history=tuple(state.history),
            best_step=schedule.best_step,
            best_loss=schedule.best_loss,
            flat_at=schedule.flat_at,
            num_tokens=progress.num_tokens,
            seconds=progress.seconds,
            peak_bytes=network.peak_bytes(),
        )

    @property
    def initial_loss(self) -> float:
        loss = self.history[0].valid_loss
        assert loss is not None
        return loss

    def announce(self, logger: logging.Logger) -> None:
        """How it went, in a line or two."""
        logger.info(
            "%s: validation loss %.4f before, %.4f at step %d of %d; %s tokens in %.1f minutes, peak memory %.2f GiB",
            self.name,
            self.initial_loss,
            self.best_loss,
            self.best_step,
            self.history[-1].step,
            f"{self.num_tokens:,}",
            self.seconds / 60,
            self.peak_bytes / 2**30,
        )
        if self.best_loss >= self.initial_loss:
            logger.warning(
                "%s: no step was better on the validation rows than %s; train longer, or on more rows",
                self.name,
                f"the adapter in {start}"
                if (start := self.settings["warm_start"])
                else "the base without an adapter",
            )


def write_weights(
    directory: Path, result: Result, network: Network, weights: Mapping[str, torch.Tensor]
) -> None:
    """The adapter alone, of the parameters `weights`: what the reader is shown before anything is trained."""
    _write(
        directory,
        replace(result, matrices=network.matrices(weights), magnitudes=network.magnitudes(weights)),
        notes=result.notes,
        extra_files={},
    )


def write_result(directory: Path, result: Result, proof: RoundTrip | None = None) -> None:
    """All files of the adapter; the proof too, once there is one. Raises TrainingDiverged for NaN in a tensor."""
    best = {
        "num_steps": result.history[-1].step,
        "best_step": result.best_step,
        "initial_validation_loss": round(result.initial_loss, 6),
        "validation_loss": round(result.best_loss, 6),
    }
    extra_files = {
        METRICS_FILE: as_csv(result.history),
        CURVE_FILE: loss_curve(result.history, best_step=result.best_step, title=f"{result.name}: loss"),
    }
    notes: dict[str, Any] = {**result.notes, **best}
    if proof is not None:
        notes["round_trip"] = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in asdict(proof).items()
        }
        extra_files[CARD_FILE] = _card(result, proof)
    _write(directory, result, notes=notes, extra_files=extra_files)


def _write(
    directory: Path, result: Result, *, notes: Mapping[str, object], extra_files: Mapping[str, str]
) -> None:
    try:
        write_adapter(
            directory,
            result.matrices,
            r=result.rank,
            # rsLoRA's scale is folded into alpha: then every loader scales rightly, also one that has never heard
            # of use_rslora.
            lora_alpha=result.scale * result.rank,
            target_modules=result.target_modules,
            base_name=result.base,
            base_fingerprint=result.fingerprint,
            magnitudes=result.magnitudes,
            revision=result.revision,
            notes=notes,
            extra_files=extra_files,
        )
    except ValueError as error:
        raise TrainingDiverged(f"training diverged: {error}; lower the learning rate") from error


def _card(result: Result, proof: RoundTrip) -> str:
    flat = "" if result.flat_at is None else f"; flat at step {result.flat_at}, decayed from there"
    curve = (
        f"{result.initial_loss:.4f} before, {result.best_loss:.4f} at step {result.best_step} of"
        f" {result.history[-1].step}{flat}"
    )
    settings = {key: value for key, value in result.settings.items() if value not in (None, False, "none")}
    return model_card(
        name=result.name,
        base=result.base,
        facts=(*result.facts, ("validation loss", curve)),
        settings=settings,
        proof=str(proof),
        measured_by=result.measured_by,
    )


def _split(recipe: Recipe, dataset: Dataset) -> dict[str, float | str]:
    return {
        "fraction": recipe.validation_fraction,
        "seed": recipe.seed,
        "lines_sha256": dataset.held_back_sha256,
    }


def _hub_revision(directory: Path) -> str | None:
    """The commit of a base that came from the Hub, whose cache keeps it under snapshots/COMMIT."""
    return directory.name if directory.parent.name == "snapshots" else None
