"""Rooms beside the server, in their simplest form: one token is one byte, and every answer is the same text."""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from adapterd.core import (
    AdapterDigest,
    AdapterId,
    AdapterMix,
    BaseSpec,
    EngineStats,
    LoadedName,
    Output,
    RegistryStats,
    Request,
    RequestId,
    TokenLogprobs,
)
from adapterd.errors import (
    AdapterRefused,
    BeingRead,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    OtherContent,
)
from adapterd.metrics import Metrics

ANSWER = "Grüße!"
SUPPORT = AdapterId(AdapterDigest("5a" * 32), "support")

SPEC = BaseSpec(
    name="tiny",
    root="models/tiny",
    architecture="Fake",
    dtype="float32",
    vocab_size=256,
    max_model_len=200,
    lora_targets={},
    eos_token_ids=frozenset({0}),
)

STATS = EngineStats(
    num_waiting=3,
    num_running=2,
    kv_blocks_total=10,
    kv_blocks_held=4,
    kv_blocks_cached=1,
    kv_block_size=16,
    adapter_bytes_total=1000,
    adapter_bytes_resident=100,
    adapter_bytes_held=0,
    resident=(SUPPORT,),
    resident_bytes=(100,),
    waiting=(((), 3),),
    num_steps=5,
    num_tokens_computed=50,
    num_preemptions=1,
    num_prefix_hit_tokens=0,
    num_prefix_query_tokens=7,
    num_uploads=1,
    num_evictions=0,
    num_steps_with_edits=0,
    heartbeat_seconds=0.0,
    failed=None,
)


REGISTRY_STATS = RegistryStats(
    num_ready=1,
    num_failed=0,
    num_behind=3,
    num_loading=0,
    host_bytes_total=1000,
    host_bytes=100,
    num_host_hits=4,
    num_host_misses=1,
    num_host_evictions=0,
    num_reads=1,
    median_bytes=80,
    num_changes=1,
    manifest_failed=True,
)


class FakeRenderer:
    token_bytes = tuple(bytes([value]) for value in range(256))
    special_token_ids = frozenset({0})
    strips_leading_space = False

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        return self.encode("".join(f"{message['role']}:{message['content']}\n" for message in messages))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class FakeResolved:
    mix: AdapterMix = ()
    model: str = "tiny"
    digest: str = "base"
    chat_template: str | None = None
    eos_token_ids: frozenset[int] = frozenset({0})
    generation_defaults: Mapping[str, float | int] = field(default_factory=dict)
    adapter_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class FakeEntry:
    name: str
    state: str = "READY"
    id: AdapterId | None = SUPPORT
    path: str = "adapters/support"
    loaded_at: float | None = 1700000000.0
    is_pinned: bool = False


@dataclass(frozen=True)
class FakeDescription:
    model: str = "tiny"
    digest: str = "base"
    path: str | None = None
    loaded_at: float | None = None


class FakeLease:
    def __init__(self, leases: list["FakeLease"]) -> None:
        self._leases = leases
        leases.append(self)

    def release(self) -> None:
        self._leases.remove(self)


class FakeRegistry:
    """Knows the base, and the adapter "support" with defaults of its own."""

    def __init__(self) -> None:
        self.entries = {"support": FakeEntry("support")}
        self.leases: list[FakeLease] = []
        self.readings: list[Future[object]] = []
        """While it holds one, weights have to be read first; each is waited for once."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def resolve(self, model: str) -> FakeResolved:
        if model in ("tiny", "base"):
            return FakeResolved()
        if self.readings:
            raise BeingRead("the weights are being read", name="support", done=self.readings.pop())
        name = model.removeprefix("tiny:")
        if name not in self.entries:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
        defaults = {"temperature": 0.5, "top_k": 7}
        digest = SUPPORT.digest
        return FakeResolved(
            ((SUPPORT, 1.0),),
            f"tiny:{name}",
            digest,
            generation_defaults=defaults,
            adapter_names=(name,),
        )

    def describe(self, model: str) -> FakeDescription:
        if model in ("tiny", "base"):
            return FakeDescription()
        name = model.removeprefix("tiny:")
        if name not in self.entries:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
        entry = self.entries[name]
        return FakeDescription(f"tiny:{name}", SUPPORT.digest, entry.path, entry.loaded_at)

    def lease(self, mix: AdapterMix) -> FakeLease:
        return FakeLease(self.leases)

    def load(self, name: str, path: str, *, inplace: bool, pinned: bool = False) -> AdapterId:
        if name == "owned":
            raise Conflict(f"{name} is owned by the manifest", param="name", code="owned_by_manifest")
        if name in self.entries and not inplace:
            raise OtherContent(f"{name} holds other content", param="name")
        if ".." in path:
            raise InvalidRequest(f"{path} is no folder below the adapter directories", param="source")
        if "missing" in path:
            raise AdapterRefused(f"no adapter at {path}")
        self.entries[name] = FakeEntry(name, path=path, is_pinned=pinned)
        return SUPPORT

    def unload(self, name: str) -> None:
        if name == "owned":
            raise Conflict(f"{name} is owned by the manifest", param="name", code="owned_by_manifest")
        if self.entries.pop(name, None) is None:
            raise ModelNotFound(f"no adapter {name}")

    def pin(self, name: str, *, pinned: bool = True) -> FakeEntry:
        self.entries[name] = replace(self.entries[name], is_pinned=pinned)
        return self.entries[name]

    def stats(self) -> RegistryStats:
        loading = [entry for entry in self.entries.values() if entry.state == "LOADING"]
        return replace(REGISTRY_STATS, num_loading=len(loading))

    def loaded(self, on_device: Collection[AdapterId]) -> Sequence[LoadedName]:
        return tuple(
            LoadedName(entry.name, entry.id, 8, entry.is_pinned)
            for entry in self.entries.values()
            if entry.id is not None
        )

    def list(self) -> Sequence[FakeEntry]:
        return tuple(self.entries.values())


class FakeEngine:
    """Gives every sequence the bytes of `answer`, one a step.

    `step_seconds` slows it down; while `is_held` it computes nothing; sequences fail after `breaks_at` tokens.
    """

    def __init__(self, answer: str = ANSWER, *, step_seconds: float = 0.0) -> None:
        self.answer = answer.encode()
        self.step_seconds = step_seconds
        self.max_model_len = SPEC.max_model_len
        self.requests: list[Request] = []
        self.running: dict[tuple[RequestId, int], tuple[Request, int]] = {}
        self.refusal: Exception | None = None
        self.breaks_at: int | None = None
        self.is_held = False
        self._changed = threading.Condition()
        self._stopping = False
        self._stats = STATS

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            self.requests.append(request)
            self.running |= {(request.id, index): (request, 0) for index in range(request.num_sequences)}
            self._changed.notify()

    def abort(self, request_id: RequestId) -> None:
        with self._changed:
            self.running = {key: state for key, state in self.running.items() if key[0] != request_id}

    def stats(self) -> EngineStats:
        return replace(self._stats, heartbeat_seconds=time.monotonic())

    def release(self) -> None:
        """Compute again what was held."""
        with self._changed:
            self.is_held = False
            self._changed.notify()

    def fail(self, reason: str) -> None:
        self._stats = replace(self._stats, failed=reason)

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(deliver,))
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self, deliver: Callable[[list[Output]], None]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or (self.running and not self.is_held))
                if self._stopping:
                    return
                outputs = [
                    self._step(request, index, done) for (_, index), (request, done) in self.running.items()
                ]
                self.running = {
                    (output.request_id, output.index): (
                        self.running[output.request_id, output.index][0],
                        output.num_output_tokens,
                    )
                    for output in outputs
                    if output.finish_reason is None
                }
            deliver(outputs)
            time.sleep(self.step_seconds)

    def _step(self, request: Request, index: int, done: int) -> Output:
        params, prompt = request.params, request.prompt_token_ids
        if done == self.breaks_at:
            return Output(request.id, index, (), "", (), len(prompt), 0, done, "error", error="out of luck")
        prompt_logprobs = () if params.prompt_logprobs is None or done else prompt[1:]
        scored = tuple(TokenLogprobs(token, -0.5, 1, ((token, -0.5),)) for token in prompt_logprobs)
        if params.max_tokens == 0:
            return Output(request.id, index, (), "", (), len(prompt), 4, 0, "length", prompt_logprobs=scored)
        token, done = self.answer[done], done + 1
        # Text comes only with whole characters, as the real detokenizer gives it.
        before = self.answer[: done - 1].decode("utf-8", "ignore")
        text = self.answer[:done].decode("utf-8", "ignore")[len(before) :]
        logprobs = (TokenLogprobs(token, -0.25, 1, ((token, -0.25), (0, float("-inf")))),)
        reason = "stop" if done == len(self.answer) else "length" if done == params.max_tokens else None
        return Output(
            request.id,
            index,
            (token,),
            text,
            () if params.logprobs is None else logprobs,
            len(prompt),
            4,
            done,
            reason,
            prompt_logprobs=scored,
        )


@dataclass
class FakeDaemon:
    engine: FakeEngine = field(default_factory=FakeEngine)
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    renderer: FakeRenderer = field(default_factory=FakeRenderer)
    spec: BaseSpec = SPEC
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.spec.name, lambda: self.engine.stats(), lambda: self.registry)
