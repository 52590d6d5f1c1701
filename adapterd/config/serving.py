"""What `serve` is told, and what fetches, sees and proves adapters: `pull`, `adapters`, `adapters prove`."""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from adapterd.config.settings import Bytes, Device, Names, Paths, Patterns, Settings, Sources, flag
from adapterd.lora_modules import LoraModule, parse_lora_module

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "bnb-8bit", "bnb-4bit"]


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


AlwaysTrue = Annotated[bool, AfterValidator(_always_true)]
LoraModuleList = Annotated[tuple[LoraModule, ...], BeforeValidator(_parse_modules)]
Spelling = Literal["prefixed", "bare"]
_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "prefixed": ("prefixed",),
    "bare": ("bare",),
    "both": ("prefixed", "bare"),
}


def _check_provable(quantization: Quantization, what: str) -> None:
    """Raise if `what` could not compare answers of such a base with PEFT's over the same weights in float32."""
    if quantization.startswith("bnb-"):
        message = (
            "{what} cannot go with --quantization {quantization}: the answers are compared with those over the same"
            " weights in float32 on the CPU, where there is no bitsandbytes; use --quantization int8 or none"
        )
        raise PydanticCustomError("quantization", message, {"what": what, "quantization": quantization})


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
    max_queue: int = Field(
        1024, ge=1, description="requests that may wait beside those that run; more are answered 429"
    )

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
        False,
        description="let callers change which adapters are served: by /v1/adapters, and by vLLM's and SGLang's load and"
        " unload calls",
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
    insecure_no_auth: bool = Field(
        False,
        description="something in front checks who calls: allow a public --host without keys for clients, and any name"
        " as a request's Host",
    )
    prove_idle: float | None = Field(
        None,
        ge=0,
        description="after so many seconds without work, compare adapters' whole answers with PEFT's in a process of"
        " its own, which holds the base once more (default: never)",
    )
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

    @model_validator(mode="after")
    def _idle_proofs_are_possible(self) -> "ServeSettings":
        if self.prove_idle is not None:
            _check_provable(self.quantization, "--prove-idle")
        return self


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

    @model_validator(mode="after")
    def _proofs_are_possible(self) -> "ProveSettings":
        _check_provable(self.quantization, self.command)
        return self
