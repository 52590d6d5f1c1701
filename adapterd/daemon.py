"""Everything that serves, assembled in one process: what `serve`, `eval` and the tests stand on. No HTTP."""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from adapterd.adapter import Adapter
from adapterd.adapter_writer import base_fingerprint
from adapterd.core import AdapterId, BaseSpec, Request, RequestId
from adapterd.database import Database
from adapterd.device_pins import DevicePins
from adapterd.engine.build import EngineSizes, build_engine, check_fits
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine
from adapterd.engine.offline import Finished, collect
from adapterd.errors import AdapterRefused, BaseRefused
from adapterd.first_use import allowed_by
from adapterd.host_memory import free_host_bytes
from adapterd.lora_modules import NO_MODULES, LoraModules
from adapterd.metrics import Metrics
from adapterd.model.base import DeviceName, load_base
from adapterd.model.checkpoint import DtypeName, QuantizationName
from adapterd.model.device_memory import DEFAULT_LORA_RANK
from adapterd.model.find import find_base
from adapterd.model.runner import Runner
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.render import Renderer
from adapterd.router_view import Spelling
from adapterd.sources.allow import AllowList
from adapterd.sources.cache import SourceCache
from adapterd.sources.download import Downloader
from adapterd.sources.places import AdapterPlaces
from adapterd.stages import Stages
from adapterd.token_table import TokenTable

_logger = logging.getLogger(__name__)

_HOST_BYTES = 4
"""Of an element of an adapter on the host, at most: files hold float32 or less."""


class DaemonSettings(EngineSizes, Protocol):
    """What of the settings is needed to serve; `config.EngineSettings` is the real thing."""

    @property
    def base(self) -> str: ...
    @property
    def served_name(self) -> str | None: ...
    @property
    def adapters(self) -> Sequence[Path]: ...
    @property
    def dtype(self) -> DtypeName: ...
    @property
    def device(self) -> DeviceName: ...
    @property
    def quantization(self) -> QuantizationName: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def host_memory(self) -> int | None: ...
    @property
    def max_lora_rank(self) -> int | None: ...
    @property
    def max_cpu_loras(self) -> int | None: ...


class SourceSettings(Protocol):
    """Where adapters may come from besides the watched directories; `config.ServeSettings` is the real thing."""

    @property
    def manifest(self) -> Path | None: ...
    @property
    def allow_source(self) -> Sequence[str]: ...
    @property
    def resolve(self) -> Sequence[str]: ...
    @property
    def cache(self) -> Path | None: ...
    @property
    def cache_size(self) -> int: ...
    @property
    def download_timeout(self) -> float: ...


class Daemon:
    """The parts, and the order in which they start and stop."""

    def __init__(
        self,
        spec: BaseSpec,
        renderer: Renderer,
        registry: AdapterRegistry,
        engine: Engine,
        metrics: Metrics,
    ) -> None:
        self.spec = spec
        self.metrics = metrics
        self.renderer = renderer
        self.registry = registry
        self.engine = engine

    @classmethod
    def build(
        cls,
        settings: DaemonSettings,
        *,
        state: Path | None = None,
        sources: SourceSettings | None = None,
        modules: LoraModules = NO_MODULES,
        spellings: Collection[Spelling] = ("prefixed", "bare"),
        stages: Stages | None = None,
    ) -> "Daemon":
        """Load the base and open the registry, kept in the directory `state` if one is given.

        `modules` are adapters beside those of the settings' directories; without `sources` they come from nowhere
        else. `spellings` are those under which routers hear of resident adapters. `stages` is told where the
        seconds go. Raises BaseRefused or ConfigError.
        """
        stages = stages or Stages()
        places = open_places(settings.adapters, modules, sources)
        fingerprint = base_fingerprint(find_base(settings.base))
        database = Database(state, base_fingerprint=fingerprint)
        base = load_base(
            settings.base,
            served_name=settings.served_name,
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=settings.max_model_len,
            quantization=settings.quantization,
            stages=stages,
        )
        renderer = Renderer.load(base.directory)
        # A turn may end with a token that only the chat template names.
        spec = replace(base.spec, eos_token_ids=_ends(base.spec, renderer))
        if base_fingerprint(base.directory) != fingerprint:
            raise BaseRefused(f"the base in {base.directory} was rewritten while it was loaded; start again")
        vocabulary = Vocabulary(
            TokenTable(renderer.token_bytes, renderer.strips_leading_space), renderer.special_token_ids
        )
        stages.done("tokenizer")
        # The registry tells the engine which versions have gone, the engine asks the registry for weights, both
        # tell the metrics what happens: each is handed a late look-up of the others.
        metrics = Metrics(
            spec.name,
            lambda: engine.stats(),
            lambda: registry,
            spellings=spellings,
            more_spellings=modules.spellings,
        )
        pins = DevicePins(
            lambda: engine,
            lambda: registry.pinned(),
            lambda adapter_id: registry.read(adapter_id),
            lambda mix: registry.lease(mix),
        )

        def drop(adapter_id: AdapterId) -> None:
            engine.retire(adapter_id)
            pins.dropped(adapter_id)

        registry = AdapterRegistry(
            AdaptedBase(spec, renderer.identity, fingerprint, base.weights, base.lay_out),
            places,
            on_drop=drop,
            check=lambda adapter: _check(runner, adapter, settings.max_lora_rank),
            database=database,
            host_bytes=host_bytes(settings, spec),
            events=metrics,
            pins=pins,
        )
        runner, engine = build_engine(
            base, vocabulary, registry.weights, settings, events=metrics, on_pin_failed=pins.failed
        )
        stages.done("memory")
        return cls(spec, renderer, registry, engine, metrics)

    def generate(self, requests: Sequence[Request]) -> dict[tuple[RequestId, int], Finished]:
        """Run requests to their end in this thread, by (request id, index). The engine must not be started."""
        for request in requests:
            self.engine.submit(request)
        return collect(self.engine)


def _ends(spec: BaseSpec, renderer: Renderer) -> frozenset[int]:
    """Every token that ends an answer of the base. What is none of its vocabulary (-1, or a token that the tokenizer
    has beyond the embedding) ends nothing: it must not be in the way of a step that holds end tokens back.
    """
    named = spec.eos_token_ids | renderer.eos_token_ids
    known = frozenset(token_id for token_id in named if 0 <= token_id < spec.vocab_size)
    if known != named:
        _logger.warning(
            "the base names %s as ends of an answer, and its vocabulary has %d tokens: no answer will end with them",
            sorted(named - known),
            spec.vocab_size,
        )
    return known


def host_bytes(settings: DaemonSettings, spec: BaseSpec) -> int:
    """Bytes of host memory for adapters: as set, enough for as many as set, or a quarter of what is free now."""
    if settings.host_memory is not None:
        return settings.host_memory
    if settings.max_cpu_loras is not None:
        rank = settings.max_lora_rank or DEFAULT_LORA_RANK
        elements = sum(d_out + d_in for d_out, d_in in spec.lora_targets.values())
        return settings.max_cpu_loras * rank * elements * _HOST_BYTES
    return free_host_bytes() // 4


def _check(runner: Runner, adapter: Adapter, max_rank: int | None) -> None:
    """Raise AdapterRefused for an adapter that can never be served here."""
    if max_rank is not None and adapter.max_rank > max_rank:
        raise AdapterRefused(
            f"adapter '{adapter.id.name}' has rank {adapter.max_rank} and --max-lora-rank is {max_rank}; set it"
            " higher, or leave it out: adapterd needs none"
        )
    check_fits(runner, adapter)


def open_places(
    directories: Sequence[Path], modules: LoraModules, sources: SourceSettings | None
) -> AdapterPlaces:
    """Where adapters come from, with a cache if some have to be downloaded. Raises ConfigError."""
    local = AdapterPlaces(directories, modules.folders)
    if sources is None:
        return local
    allow = AllowList((*sources.allow_source, *allowed_by(sources.resolve)))
    cache = None
    if allow.allows_remote:
        downloader = Downloader(allow, timeout_seconds=sources.download_timeout, max_bytes=sources.cache_size)
        directory = default_cache() if sources.cache is None else sources.cache
        cache = SourceCache(directory, downloader, max_bytes=sources.cache_size)
    return replace(local, allow=allow, cache=cache, manifest=sources.manifest, resolve=sources.resolve)


def default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "adapterd"
