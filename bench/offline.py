"""An engine over a base and adapters that are in memory: no registry, no tokenizer, no server.

Requests are random token ids and answers are greedy, so that speed is all there is to see. Turned by hand, a step at
a time, by whoever measures.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapterd.adapter import Adapter
from adapterd.core import BASE_MIX, AdapterEvents, AdapterId, Request, RequestId, SamplingParams, alone
from adapterd.engine.build import build_engine
from adapterd.engine.detokenizer import Vocabulary
from adapterd.model.base import Base
from adapterd.token_table import TokenTable
from bench.workload import token_prompt


@dataclass(frozen=True)
class Sizes:
    """The engine's settings for a bench: everything fits at once, and prompts run whole. Memory in bytes."""

    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_memory: int | None = None
    kv_memory: int | None = None
    max_queue: int = 1024
    max_loras: int | None = None
    max_lora_rank: int | None = None


@dataclass(frozen=True)
class Steps:
    """Seconds of each step of one static batch: those until every sequence had its first token, and the others."""

    prefill: list[float]
    decode: list[float]


@dataclass
class OfflineEngine:
    """`adapters` may grow at any time; a request names the adapter it runs."""

    base: Base
    sizes: Sizes
    adapters: list[Adapter] = field(default_factory=list)
    events: AdapterEvents | None = None
    num_requests: int = 0

    def __post_init__(self) -> None:
        self._versions: dict[AdapterId, Adapter] = {}
        token_bytes = (b" word",) * self.base.spec.vocab_size
        vocabulary = Vocabulary(TokenTable(token_bytes, strips_leading_space=False), frozenset())
        self.runner, self.engine = build_engine(
            self.base, vocabulary, self._versions.__getitem__, self.sizes, events=self.events
        )
        for adapter in self.adapters:
            self.know(adapter)

    def know(self, adapter: Adapter) -> None:
        """From now on requests may name this adapter."""
        self._versions[adapter.id] = adapter

    def submit(self, prompt_tokens: int, output_tokens: int, adapter: Adapter | None, seed: str) -> RequestId:
        """Queue one request; another `seed` is another prompt."""
        self.num_requests += 1
        first, end = self.base.spec.vocab_size // 4, self.base.spec.vocab_size
        request = Request(
            id=RequestId(f"request-{self.num_requests}"),
            prompt_token_ids=tuple(token_prompt(prompt_tokens, range(first, end), seed)),
            params=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True),
            mix=alone(adapter.id) if adapter else BASE_MIX,
            eos_token_ids=frozenset(),
            arrival_seconds=0.0,
        )
        self.engine.submit(request)
        return request.id

    def prefill(self, ids: Sequence[RequestId]) -> list[float]:
        """Step until each of these requests has a token; seconds of each step."""
        waiting, seconds = set(ids), []
        while waiting:
            began = time.perf_counter()
            outputs = self.engine.step()
            seconds.append(time.perf_counter() - began)
            waiting -= {output.request_id for output in outputs}
        return seconds

    def run(self, ids: Sequence[RequestId]) -> Steps:
        """Step until everything is answered."""
        prefill, decode = self.prefill(ids), []
        while self.engine.has_work():
            began = time.perf_counter()
            self.engine.step()
            decode.append(time.perf_counter() - began)
        return Steps(prefill, decode)

    def abandon(self, ids: Sequence[RequestId]) -> None:
        """End requests before their time."""
        for request_id in ids:
            self.engine.abort(request_id)
        while self.engine.has_work():
            self.engine.step()
