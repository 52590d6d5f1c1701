"""What the commands are told that make an adapter: `check`, `estimate`, `train`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from adapterd.config.settings import MAP, Device, Names, Settings, flag

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class TrainSettings(Settings):
    command: ClassVar[str] = "train"

    base: str = Field(
        "mini", min_length=1, description="base model: a directory, a hub id, or the embedded 'mini'"
    )
    data: Path = Field(
        description="training rows: JSONL of chat messages or of prompt and completion, or CSV"
    )
    heldout: Path | None = Field(None, description="rows that are never trained on, for the evaluation")
    validation: Path | None = Field(None, description="rows for early stopping (default: a part of --data)")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="part of --data held back for early stopping"
    )
    map: Names = Field((), description=MAP)
    name: str = Field(pattern=_NAME, description="name of the adapter")
    out: Path | None = Field(
        None,
        description="directory of adapters to publish into, as OUT/NAME (default: adapters, or the folder of"
        " --data itself if it bears the adapter's name)",
    )
    rank: int | None = Field(None, ge=1, le=1024, description="rank of the update (default: 16)")
    alpha: float | None = Field(
        None, gt=0, description="the update is scaled by alpha / rank (default: twice the rank)"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    use_dora: bool = Field(False, description="train a magnitude for each output as well (DoRA)")
    warm_start: Path | None = Field(
        None, description="PEFT directory to go on from; its rank, scale and linears are kept"
    )
    target_modules: Names = Field(("all-linear",), description="linears to adapt, by last name")
    epochs: float | None = Field(
        None, gt=0, description="passes over the rows at most (default: 10 for few rows to 1 for many)"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate (default: by the base's size, 2e-4 at 8 billion)"
    )
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="part of the steps that warm up")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="part of the steps in which the rate falls to nothing at the end"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of A and B")
    batch_size: int = Field(8, ge=1, description="rows in one optimiser step")
    micro_batch_tokens: int = Field(16384, ge=1, description="tokens computed at once at most")
    max_length: int | None = Field(
        None, ge=1, description="tokens of a row at most (default: the base's context)"
    )
    on_too_long: Literal["error", "drop"] = Field(
        "error", description="longer rows are refused by line, or left out and said so; none is ever cut"
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute rows end to end without padding (auto: where the family proves exact)"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute activations twice to save memory (auto: if they would not fit)"
    )
    quantization: Literal["none", "bnb-8bit", "bnb-4bit"] = Field(
        "none", description="hold the base in 8 or 4 bits (QLoRA; CUDA and bitsandbytes)"
    )
    patience: int = Field(
        3, ge=1, description="evaluations without a better loss before decaying, and again before stopping"
    )
    evaluations_per_epoch: int = Field(2, ge=1, description="how often the validation loss is measured")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialisation and row order")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type to compute in (auto: bfloat16, float32 on a CPU); A and B are always float32",
    )
    device: Device = Field("auto", description="where to compute (auto: cuda if there is one)")
    checkpoint_seconds: float = Field(
        30.0, gt=0, description="a killed run loses at most the work of this time"
    )
    resume: bool = Field(
        True, description="go on from where a run of the same name was ended; --no-resume starts afresh"
    )
    tensorboard: Path | None = Field(
        None, description="directory to write TensorBoard logs into (needs tensorboardX)"
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="serve Prometheus' /metrics of the run on this port while it lasts; 0 picks a free one",
    )
    metrics_host: str | None = Field(
        None, min_length=1, description="address for --metrics-port to listen on (default: 127.0.0.1)"
    )

    @model_validator(mode="after")
    def _a_host_has_a_port(self) -> "TrainSettings":
        if self.metrics_host is not None and self.metrics_port is None:
            message = "{host} says where {port} listens; set that as well"
            names = {"host": flag("metrics_host"), "port": flag("metrics_port")}
            raise PydanticCustomError("metrics_host", message, names)
        return self


class EstimateSettings(TrainSettings):
    """A recipe is estimated as it stands; what only concerns its writing changes nothing."""

    command: ClassVar[str] = "estimate"

    name: str = Field("estimate", pattern=_NAME, description="name of the adapter")
    price_per_hour: float | None = Field(None, ge=0, description="what an hour of this machine costs")
    probe_seconds: float = Field(10.0, gt=0, description="time to train for, to see how fast it is")
    json_: bool = Field(False, description="print the estimate as JSON")


class CheckSettings(Settings):
    command: ClassVar[str] = "check"
    positional: ClassVar[str | None] = "data"

    data: Path = Field(description="rows: JSONL of chat messages or of prompt and completion, or CSV")
    base: str = Field(
        "mini",
        min_length=1,
        description="base whose tokenizer and template count: a directory, a hub id, or 'mini'",
    )
    heldout: Path | None = Field(
        None, description="rows that are never trained on: is any of them in --data?"
    )
    map: Names = Field((), description=MAP)
    max_length: int | None = Field(
        None, ge=1, description="longest row in tokens (default: the base's context)"
    )
    show_mask: int | None = Field(
        None, ge=1, description="show the tokens of the row in this line, and which carry loss"
    )
    fix: Path | None = Field(
        None, description="write a cleaned copy to this file, and what it dropped to PATH.dropped.jsonl"
    )
    strict: bool = Field(False, description="warnings make the file unusable too")
    json_: bool = Field(False, description="print the report as JSON")
