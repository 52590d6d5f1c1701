"""Settings of each command: one declaration gives flag, variable, TOML key, default and help.

`max_queue` is `--max-queue`, `ADAPTERD_MAX_QUEUE` and `max_queue = 1024` in the file named by `--config`.
A flag wins over a variable, a variable over the file, the file over the default. An unknown key or variable
is an error: a setting that is ignored is worse than one that is refused.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapterd.errors import ConfigError
from adapterd.lora_modules import LoraModule, parse_lora_module

ENV_PREFIX = "ADAPTERD_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"

_BYTE_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """A number of bytes from "512MiB", "2GB", "1048576" or an integer."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    unit = match[2].lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError("is not a size; write bytes or a unit, as in 512MiB or 2GB")
    return int(float(match[1]) * _BYTE_UNITS[unit])


def _split(separator: str) -> BeforeValidator:
    """A variable holds one string where a flag repeats and a file has a list."""

    def split(value: object) -> object:
        return tuple(part for part in value.split(separator) if part) if isinstance(value, str) else value

    return BeforeValidator(split)


def _always_true(value: bool) -> bool:
    if not value:
        raise ValueError(
            "cannot be: adapters are always enabled, and traffic of the bare base pays nothing for it"
        )
    return value


def _parse_modules(value: object) -> object:
    """From texts, or from the tables of a file; a variable has one a line."""
    items = value.splitlines() if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    return tuple(parse_lora_module(json.dumps(i) if isinstance(i, dict) else i) for i in items if i)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Paths = Annotated[tuple[Path, ...], _split(os.pathsep)]
AlwaysTrue = Annotated[bool, AfterValidator(_always_true)]
LoraModuleList = Annotated[tuple[LoraModule, ...], BeforeValidator(_parse_modules)]
Names = Annotated[tuple[str, ...], _split(",")]
Sources = Annotated[Names, "SOURCE"]  # what the help calls one of them
Patterns = Annotated[Names, "PATTERN"]
Expressions = Annotated[tuple[str, ...], _split("\n"), "REGEX"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["none", "int8", "bnb-8bit", "bnb-4bit"]
LogLevel = Literal["debug", "info", "warning", "error"]
Spelling = Literal["prefixed", "bare"]
_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "prefixed": ("prefixed",),
    "bare": ("bare",),
    "both": ("prefixed", "bare"),
}


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: ClassVar[str]
    positional: ClassVar[str | None] = None
    """The field that is given without a flag."""

    log_level: LogLevel = Field("info", description="how much is logged, to stderr")


class EngineSettings(Settings):
    """What the engine needs, whoever asks it: the daemon or an evaluation."""

    base: str = Field(
        "mini", min_length=1, description="base model: a directory, a hub id, or the embedded 'mini'"
    )
    served_name: str | None = Field(
        None, description="name of the base in the API (default: its last path part)"
    )
    adapters: Paths = Field((), description="folders of adapters, or folders that hold them")
    dtype: DType = Field("auto", description="type to compute in (auto: the checkpoint's; float32 on a CPU)")
    device: Device = Field("auto", description="where to compute (auto: cuda if there is one)")
    quantization: Quantization = Field(
        "none", description="keep the base's linears in fewer bits; bnb-*: by bitsandbytes, on cuda"
    )
    kv_memory: Bytes | None = Field(
        None, description="memory for keys and values, as in 512MiB (default: automatic)"
    )
    adapter_memory: Bytes | None = Field(
        None, description="memory for resident adapters (default: automatic)"
    )
    host_memory: Bytes | None = Field(
        None, description="memory for adapters on the host (default: a quarter of what is free)"
    )
    max_loras: int | None = Field(
        None, ge=1, description="vLLM's word for adapter memory: room for so many of --max-lora-rank"
    )
    max_cpu_loras: int | None = Field(
        None, ge=1, description="vLLM's word for host memory: room for so many of --max-lora-rank"
    )
    max_lora_rank: int | None = Field(
        None, ge=1, description="refuse adapters of a higher rank (default: no limit)"
    )
    max_num_batched_tokens: int = Field(2048, ge=1, description="tokens computed in one step at most")
    max_num_seqs: int = Field(64, ge=1, description="sequences that run at once at most")
    max_model_len: int | None = Field(
        None, ge=1, description="prompt and answer together (default: the base's)"
    )
    max_queue: int = Field(1024, ge=0, description="requests that may wait; more are answered 429")

    @model_validator(mode="after")
    def _memory_is_said_once(self) -> "EngineSettings":
        for size, count in (("adapter_memory", "max_loras"), ("host_memory", "max_cpu_loras")):
            if getattr(self, size) is not None and getattr(self, count) is not None:
                message = "{count} and {size} both say how much memory there is; leave one out"
                raise PydanticCustomError(count, message, {"size": flag(size), "count": flag(count)})
        return self


class ServeSettings(EngineSettings):
    command: ClassVar[str] = "serve"

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    enable_lora: AlwaysTrue = Field(
        True, description="for those who come from vLLM: adapters are always enabled"
    )
    lora_modules: LoraModuleList = Field(
        (), description='more adapters, as vLLM has it: NAME=PATH or {"name": NAME, "path": PATH}'
    )
    state: Path | None = Field(
        None,
        description="directory where versions, aliases and pins are kept over a restart (default: nowhere)",
    )
    manifest: Path | None = Field(
        None, description="adapters.yaml: these names, from these sources; followed when it changes"
    )
    allow_source: Patterns = Field(
        (),
        description="where adapters may come from besides --adapters: hf://my-org/*, s3://bucket/*,"
        " https://host/*, /mnt/models",
    )
    resolve: Patterns = Field(
        (), description="where to look for an adapter that is asked for and unknown, as in hf://my-org/*"
    )
    cache: Path | None = Field(
        None,
        description="directory for downloads (default: ~/.cache/adapterd, used only if something is downloaded)",
    )
    cache_size: Bytes = Field(
        16 * 2**30, description="disk for downloads, as in 16GiB; the longest unused leaves (default: 16GiB)"
    )
    download_timeout: float = Field(600.0, gt=0, description="seconds that one download may take")
    allow_runtime_adapters: bool = Field(
        False, description="serve /v1/load_lora_adapter and /v1/unload_lora_adapter"
    )
    model_id_style: Literal["prefixed", "bare", "both"] | None = Field(
        None,
        description="how /v1/models and metrics for routers call adapters: BASE:ADAPTER, ADAPTER, or both"
        " (default: both in metrics, and in /v1/models with --allow-runtime-adapters, else prefixed)",
    )
    api_key_file: Path | None = Field(
        None, description="accepted API keys: a file with one a line, or a folder of such files"
    )
    admin_key_file: Path | None = Field(
        None, description="the same, of keys that may also change which adapters are served"
    )
    insecure_no_auth: bool = Field(False, description="allow a public --host without keys for clients")
    drain_delay: float = Field(
        0.0, ge=0, description="seconds after SIGTERM in which new requests are still taken"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests then get to finish")

    @property
    def router_spellings(self) -> tuple[Spelling, ...]:
        """How routers hear of resident adapters."""
        return _SPELLINGS[self.model_id_style or "both"]

    @property
    def listed_spellings(self) -> tuple[Spelling, ...]:
        """How /v1/models lists adapters. Controllers that load them look for the names they gave."""
        return _SPELLINGS[self.model_id_style or ("both" if self.allow_runtime_adapters else "prefixed")]


class TrainSettings(Settings):
    command: ClassVar[str] = "train"

    base: str = Field(
        "mini", min_length=1, description="base model: a directory, a hub id, or the embedded 'mini'"
    )
    data: Path = Field(description="training rows: JSONL of chat messages")
    heldout: Path | None = Field(None, description="rows that are never trained on, for the evaluation")
    validation: Path | None = Field(None, description="rows for early stopping (default: a part of --data)")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="part of --data held back for early stopping"
    )
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="name of the adapter")
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


class TaskSettings(Settings):
    """What is asked of an adapter and what a good answer is: flags of `eval`, keys of eval.toml beside an adapter."""

    command: ClassVar[str] = "eval"

    data: Path | None = Field(
        None, description="held-out rows (default: heldout.jsonl in the adapter's folder)"
    )
    train: Path | None = Field(
        None, description="training rows to take examples from (default: train.jsonl in the adapter's folder)"
    )
    system_prompt: str | None = Field(
        None, min_length=1, description="system message for the base with a better prompt"
    )
    system_prompt_file: Path | None = Field(None, description="the same, read from a file")
    shots: int = Field(5, ge=0, le=100, description="solved training rows shown to the base; 0 for none")
    format_regex: Expressions = Field(
        (), description="a valid answer matches one of these from end to end; named groups are its slots"
    )
    json_schema: Path | None = Field(None, description="a valid answer is JSON that satisfies this schema")
    metric: str | None = Field(
        None,
        description="what decides, as in exact or chrf (default: label accuracy for labels, else exact match)",
    )
    max_tokens: int = Field(160, ge=1, description="tokens of an answer at most")


class EvalSettings(TaskSettings, EngineSettings):
    command: ClassVar[str] = "eval"
    positional: ClassVar[str | None] = "adapters"

    adapter: Names = Field((), description="names of the adapters to evaluate (default: all)")
    limit: int | None = Field(None, ge=1, description="evaluate only the first rows")
    samples: int = Field(
        3,
        ge=0,
        le=100,
        description="answers a row, drawn with different seeds, to see whether they agree; 0 or 1: none",
    )
    temperature: float = Field(0.7, gt=0, le=10, description="temperature of those draws")
    general: Path | None = Field(
        None,
        description="text on which nothing should be forgotten, in paragraphs (default: a small one that is shipped)",
    )
    price_per_hour: float | None = Field(None, ge=0, description="what an hour of this machine costs")
    peer_url: str | None = Field(
        None, description="another OpenAI-compatible server to compare with, as in https://host/v1"
    )
    peer_model: Names = Field((), description="its models to ask")
    peer_key_env: str | None = Field(None, description="variable that holds its API key")
    peer_price_in: float | None = Field(None, ge=0, description="its price of a million prompt tokens")
    peer_price_out: float | None = Field(None, ge=0, description="its price of a million answer tokens")
    judge_url: str | None = Field(None, description="an OpenAI-compatible server that grades the answers")
    judge_model: str | None = Field(None, description="its model")
    judge_key_env: str | None = Field(None, description="variable that holds its API key")
    markdown_out: Path | None = Field(None, description="write the report to this file as Markdown")
    html_out: Path | None = Field(None, description="write the report to this file as one page of HTML")
    json_out: Path | None = Field(None, description="write the report to this file as JSON")
    write_card: bool = Field(False, description="write the result table into the adapter's README.md")
    fail_under: Names = Field(
        (), description="exit with 3 if a metric of the adapter is lower, as in exact=0.9 or gain=0"
    )


class PullSettings(Settings):
    command: ClassVar[str] = "pull"
    positional: ClassVar[str | None] = "sources"

    sources: Sources = Field((), description="what to pull: SOURCE or NAME=SOURCE, perhaps with #sha256=HEX")
    into: Path = Field(description="directory to publish into, one link a name")
    manifest: Path | None = Field(
        None, description="adapters.yaml: pull what it names, withdraw what it does not"
    )
    watch: bool = Field(False, description="stay, and pull again what has changed")
    tolerate_errors: bool = Field(
        False,
        description="exit with 0 although some could not be pulled: whoever waits for this need not fail",
    )
    interval: float = Field(30.0, ge=0.1, description="seconds between two looks with --watch")
    keep: int = Field(3, ge=1, description="versions of each adapter that stay on disk")
    allow_source: Patterns = Field(
        (), description="patterns of allowed sources (default: the hosts, owners and buckets that are named)"
    )
    download_timeout: float = Field(600.0, gt=0, description="seconds that one download may take")


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
    map: Names = Field(
        (), description="what the columns are called: prompt=COLUMN completion=COLUMN system=COLUMN"
    )
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


class AdaptersSettings(Settings):
    command: ClassVar[str] = "adapters"

    url: str = Field("http://127.0.0.1:8000", min_length=1, description="address of the daemon")
    api_key: str | None = Field(None, exclude=True, description="key to send; a variable only, never a flag")
    api_key_file: Path | None = Field(None, description="file of keys, of which the first is sent")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for an answer")
    json_: bool = Field(False, description="print the daemon's answer as JSON")


class ProveSettings(EngineSettings):
    command: ClassVar[str] = "adapters prove"
    positional: ClassVar[str | None] = "names"

    names: Names = Field((), description="names of the adapters to prove (default: all)")
    json_out: Path | None = Field(None, description="write the verdicts to this file as JSON")


COMMANDS: tuple[type[Settings], ...] = (
    ServeSettings,
    TrainSettings,
    EvalSettings,
    CheckSettings,
    PullSettings,
    AdaptersSettings,
    ProveSettings,
)

S = TypeVar("S", bound=Settings)


def flag(field: str) -> str:
    return "--" + public_name(field).replace("_", "-")


def variable(field: str) -> str:
    return ENV_PREFIX + public_name(field).upper()


def public_name(field: str) -> str:
    """A field whose name pydantic keeps for itself (`json`) carries an underscore that nobody else sees."""
    return field.rstrip("_")


def takes_many(annotation: object) -> bool:
    """Whether a field's flag repeats: `--adapters a b --adapters c`."""
    return get_origin(annotation) is tuple or any(get_origin(part) is tuple for part in get_args(annotation))


def load_settings(
    settings: type[S], flags: Mapping[str, object], environ: Mapping[str, str], config: Path | None = None
) -> S:
    """Settings from flags, `ADAPTERD_` variables and the TOML file, in this order of weight.

    Raises ConfigError: a line for each thing that is wrong, naming the flag, variable or key it came from.
    """
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    for source, names in (
        (_read_toml(settings, config), lambda field: f"{field!r} in {config}"),
        (_read_environment(settings, environ), variable),
        (dict(flags), flag),
    ):
        values |= source
        origin |= {field: names(field) for field in source}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = [_sentence(item, origin) for item in error.errors(include_url=False)]
        location = error.errors()[0]["loc"]
        raise ConfigError("\n".join(lines), param=str(location[0]) if location else None) from None


def _sentence(error: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    if not error["loc"]:  # a check over several settings: its message names them
        return str(error["msg"])
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{flag(field)} is required"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    return f"{origin[field]}: {error['input']!r} {reason}"


def _read_toml(settings: type[Settings], config: Path | None) -> dict[str, object]:
    if config is None:
        return {}
    try:
        with config.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not TOML: {error}", param="config") from None
    fields = {public_name(field): field for field in settings.model_fields}
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {key!r} in {config}{_near(key, fields)}", param=key)
    return {fields[key]: _beside(config, settings, fields[key], value) for key, value in table.items()}


def _beside(config: Path, settings: type[Settings], field: str, value: object) -> object:
    """Relative paths in a file are relative to that file, so that a recipe can live beside its rows."""
    annotation = settings.model_fields[field].annotation
    if Path not in (annotation, *get_args(annotation)):
        return value
    if isinstance(value, list):
        return tuple(config.parent / part if isinstance(part, str) else part for part in value)
    return config.parent / value if isinstance(value, str) else value


def _read_environment(settings: type[Settings], environ: Mapping[str, str]) -> dict[str, object]:
    known = {variable(field) for command in COMMANDS for field in command.model_fields} | {CONFIG_VARIABLE}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"unknown variable {name}{_near(name, known)}", param=name)
    return {field: environ[variable(field)] for field in settings.model_fields if variable(field) in environ}


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.85)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
