"""The nouns every room of the house shares: plain data, no torch, no I/O.

All are frozen but `Sequence`, which engine and runner change as an answer grows. Only the frozen ones cross between
the server and the engine thread, so the engine can become a process of its own without a change of vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NewType, Protocol

from adapterd.token_counts import TokenCounts

RequestId = NewType("RequestId", str)
AdapterDigest = NewType("AdapterDigest", str)

BaseMatch = Literal["fingerprint", "shapes"]
"""How an adapter is known to be for a base: it carries the base's fingerprint, or its tensors alone fit."""

FinishReason = Literal["stop", "length", "abort", "overloaded", "error"]


@dataclass(frozen=True, order=True)
class AdapterId:
    """One version of one adapter: the digest of everything that changes an answer.

    `name` is what people found it under and takes no part in equality: KV blocks, adapter memory and
    metrics are keyed by content, and a name is only a pointer to it.
    """

    digest: AdapterDigest
    name: str = field(compare=False)


BASE_ADAPTER = AdapterId(AdapterDigest("base"), "base")
"""The base is an adapter too: the one without matrices."""

AdapterMix = tuple[tuple[AdapterId, float], ...]
"""What a sequence runs: adapters with a factor on top of each one's own scale. The base is the empty tuple."""

BASE_MIX: AdapterMix = ()


def alone(adapter_id: AdapterId) -> AdapterMix:
    """The mix of one adapter at its own scale."""
    return ((adapter_id, 1.0),)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Checked where it is made; see `server/protocol.py`.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and penalties at their neutral value are off.
    `logprobs` is the number of alternatives reported beside each chosen token (None: report nothing);
    `prompt_logprobs` the same for the prompt's own tokens. Log probabilities are those of the model's
    raw distribution, before penalties and temperature.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the next token depends on which tokens came before, beside the model."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Request:
    """What a client asked. `eos_token_ids` come from the base or from the adapter's own tokenizer files.

    `num_sequences` answers are drawn from one prompt. `arrival_seconds` is monotonic time. `continues_prompt`:
    the answer goes on where the prompt's text ends, rather than being a text of its own (a chat message).
    `prompt_field` is what the client calls its prompt; errors name it.
    `prefix_scope`: prefixes are shared with requests of the same scope alone; empty, or 32 bytes.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    mix: AdapterMix
    eos_token_ids: frozenset[int]
    arrival_seconds: float
    num_sequences: int = 1
    continues_prompt: bool = False
    prompt_field: str = "prompt"
    prefix_scope: bytes = b""


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log probability, its rank (1 is the likeliest), and the likeliest alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class Sequence:
    """One running answer.

    `token_ids` is prompt then output; `num_computed_tokens` of them have their keys and values in the
    blocks of `block_table`. There is no prefill or decode flag: a step computes some of
    `num_tokens - num_computed_tokens`, and a step that reaches `num_tokens` samples the next.
    A step in flight counts as computed: `num_in_flight` of them have this sequence, and `num_pending` tokens that
    they sample come after `token_ids`, each with its place but not known yet. Without any, both are 0.
    `passed_by_since_seconds` is when it first stood at its turn while its adapter found no memory. `token_counts` is
    brought up to date by who samples, where there are penalties.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    state: SequenceState = SequenceState.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    passed_by_since_seconds: float | None = None
    num_preemptions: int = 0
    num_in_flight: int = 0
    num_pending: int = 0
    token_counts: TokenCounts = field(default_factory=TokenCounts)

    @property
    def num_tokens(self) -> int:
        """Known or pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Known ones."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def mix(self) -> AdapterMix:
        return self.request.mix


@dataclass(frozen=True)
class ScheduledSequence:
    """`num_tokens` of a sequence to compute in this step, from `start` on; sampled if that reaches its end.

    `samples` is fixed where this is made: later the sequence has more tokens. The last token may be one that the
    step before samples and nobody has read yet: then `end` is past the sequence's `token_ids`.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.end == self.sequence.num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Batch:
    """One step's work, decided but not done: sequences sorted by mix, adapter memory to drop, then to fill."""

    scheduled: tuple[ScheduledSequence, ...]
    evictions: tuple[AdapterId, ...] = ()
    uploads: tuple[AdapterId, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(frozen=True)
class SampledToken:
    """What the runner gives back for one scheduled sequence.

    `token_id` is None while the sequence still has tokens to compute. `prompt_logprobs` holds one entry
    for each prompt token predicted in this step (the first prompt token is predicted by nothing).
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Output:
    """One sequence's step as the server sees it: new tokens, the text that is safe to show, how it ended.

    Counts are cumulative. `text` may lag behind `token_ids` while a UTF-8 sequence or a possible stop
    string is held back; the last output carries all that is left. `stop_reason` is the stop string or the
    stop token id asked for in the request; None at an end-of-sequence token.
    """

    request_id: RequestId
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class BaseModules:
    """What of the base, beside its linears, adapters may change. Paths and names are those that PEFT writes.

    `parameters` holds the shape of every parameter and buffer. `input_axes` has the modules that work token by
    token, with the axis of their input that counts tokens: of these, and of no others, some tokens of a batch may
    run with other weights. `is_tied`: embedding and head share one weight. `experts` are the mixtures held in
    three-dimensional parameters, path -> whether each expert's matrix is [d_in, d_out] (else [d_out, d_in]).
    `transposed` are the linears that keep their weight as [d_in, d_out] (GPT-2's Conv1D), which the shape of a square
    one does not show.
    """

    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    input_axes: Mapping[str, int] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    is_tied: bool = False
    experts: Mapping[str, bool] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BaseSpec:
    """What others need to know of the loaded base, without its tensors.

    `lora_targets` maps a module path, as PEFT writes it in an adapter's tensors after `base_model.model.`,
    to (d_out, d_in) of each linear that adapters may change. `dtype` is torch's name for the compute type.
    `max_model_len` bounds prompt and answer together. `quantization` says in how many bits its linears are held.
    """

    name: str
    root: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    lora_targets: Mapping[str, tuple[int, int]]
    eos_token_ids: frozenset[int]
    modules: BaseModules = field(default_factory=BaseModules)
    quantization: str = "none"


@dataclass(frozen=True)
class EngineStats:
    """Counters of the engine, copied whole between two steps; readable from any thread.

    Held memory belongs to sequences that are running. Cached KV blocks and idle resident adapters are not
    held: the next request may take their place. `adapter_bytes_resident` counts adapters on their way too,
    `resident` only those that have arrived, and `resident_bytes` are those of each of them; `waiting` tells the
    queue by what its sequences run.
    """

    num_waiting: int
    num_running: int
    kv_blocks_total: int
    kv_blocks_held: int
    kv_blocks_cached: int
    kv_block_size: int
    adapter_bytes_total: int
    adapter_bytes_resident: int
    adapter_bytes_held: int
    resident: tuple[AdapterId, ...]
    resident_bytes: tuple[int, ...]
    waiting: tuple[tuple[AdapterMix, int], ...]
    num_steps: int
    num_tokens_computed: int
    num_preemptions: int
    num_prefix_hit_tokens: int
    num_prefix_query_tokens: int
    num_uploads: int
    num_evictions: int
    num_steps_with_edits: int
    heartbeat_seconds: float
    failed: str | None
    pinned: tuple[AdapterId, ...] = ()
    num_uploading: int = 0


@dataclass(frozen=True)
class RegistryStats:
    """Counters of the registry: names by state, and the host memory that weights are kept in.

    `num_behind` counts names whose newer version was refused while the one before serves on; `manifest_failed` says
    that the manifest cannot be read, so that the one before holds.
    `host_bytes_total` is None without a limit. A miss is a request whose adapter had to be read first.
    `median_bytes` is the size of the adapters that can be asked for, 0 if there are none. `num_changes` is
    another number whenever names or the weights in memory may have changed.
    """

    num_ready: int
    num_failed: int
    num_behind: int
    num_loading: int
    host_bytes_total: int | None
    host_bytes: int
    num_host_hits: int
    num_host_misses: int
    num_host_evictions: int
    num_reads: int
    median_bytes: int
    num_changes: int
    manifest_failed: bool


@dataclass(frozen=True)
class ServerStats:
    """What only the server knows. `reading`: requests that wait for an adapter's weights to be read, by name."""

    reading: tuple[tuple[str, int], ...]
    is_ready: bool
    is_draining: bool


@dataclass(frozen=True)
class LoadedName:
    """A name, or NAME@ALIAS, that means a version whose weights are in memory, on the device or on the host."""

    spelling: str
    id: AdapterId
    rank: int
    is_pinned: bool


Tier = Literal["device", "host", "disk"]
"""Where an adapter's weights can lie. They are loaded into one: to the device from the host, to the host from
disk, to the disk from elsewhere."""


class AdapterEvents(Protocol):
    """Who is told what becomes of adapters' weights, as it happens. Called from any thread; never waits."""

    def adapter_wanted(self, name: str, *, is_resident: bool) -> None:
        """A sequence has come whose adapter is on the device, or has to be moved there first."""
        ...

    def adapter_loaded(self, name: str, tier: Tier, seconds: float) -> None: ...

    def adapter_evicted(self, name: str, tier: Tier) -> None: ...


class Unobserved:
    """AdapterEvents that nobody wants to know."""

    def adapter_wanted(self, name: str, *, is_resident: bool) -> None: ...
    def adapter_loaded(self, name: str, tier: Tier, seconds: float) -> None: ...
    def adapter_evicted(self, name: str, tier: Tier) -> None: ...
