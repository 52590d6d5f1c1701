"""Everything that serves, assembled in one process: what `serve`, `eval` and the tests stand on. No HTTP."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil

from adapterd.adapter_writer import base_fingerprint
from adapterd.core import BaseSpec, Request, RequestId
from adapterd.database import Database
from adapterd.engine.build import EngineSizes, Finished, build_engine, check_fits, collect
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.engine import Engine
from adapterd.errors import BaseRefused
from adapterd.metrics import Metrics
from adapterd.model.base import DeviceName, DtypeName, load_base
from adapterd.model.find import find_base
from adapterd.registry import AdapterRegistry
from adapterd.render import Renderer
from adapterd.token_table import TokenTable


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
    def max_model_len(self) -> int | None: ...
    @property
    def host_memory(self) -> int | None: ...


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
    def build(cls, settings: DaemonSettings, *, state: Path | None = None) -> "Daemon":
        """Load the base and open the registry, kept in the directory `state` if one is given.

        Raises BaseRefused or ConfigError.
        """
        fingerprint = base_fingerprint(find_base(settings.base))
        database = Database(state, base_fingerprint=fingerprint)
        base = load_base(
            settings.base,
            served_name=settings.served_name,
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=settings.max_model_len,
        )
        renderer = Renderer.load(base.directory)
        # A turn may end with a token that only the chat template names.
        spec = replace(base.spec, eos_token_ids=base.spec.eos_token_ids | renderer.eos_token_ids)
        if base_fingerprint(base.directory) != fingerprint:
            raise BaseRefused(f"the base in {base.directory} was rewritten while it was loaded; start again")
        vocabulary = Vocabulary(
            TokenTable(renderer.token_bytes, renderer.strips_leading_space), renderer.special_token_ids
        )
        # The registry tells the engine which versions have gone, the engine asks the registry for weights, both
        # tell the metrics what happens: each is handed a late look-up of the others.
        metrics = Metrics(spec.name, lambda: engine.stats(), lambda: registry)
        registry = AdapterRegistry(
            spec,
            settings.adapters,
            tokenizer=renderer.identity,
            base_fingerprint=fingerprint,
            on_drop=lambda adapter_id: engine.retire(adapter_id),
            check=lambda adapter: check_fits(runner, adapter),
            database=database,
            host_bytes=host_bytes(settings.host_memory),
            events=metrics,
        )
        runner, engine = build_engine(base, vocabulary, registry.weights, settings, events=metrics)
        return cls(spec, renderer, registry, engine, metrics)

    def generate(self, requests: Sequence[Request]) -> dict[tuple[RequestId, int], Finished]:
        """Run requests to their end in this thread, by (request id, index). The engine must not be started."""
        for request in requests:
            self.engine.submit(request)
        return collect(self.engine)


def host_bytes(setting: int | None) -> int:
    """Bytes of host memory for adapters: as set, or a quarter of what is free now."""
    return int(psutil.virtual_memory().available) // 4 if setting is None else setting
