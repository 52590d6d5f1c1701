"""A run's questions, and how they are put to one server: what is asked is the same for every server."""

import time
from dataclasses import dataclass

import httpx

from bench.client import LoadRequest, Record, send
from bench.target import Target
from bench.workload import Lengths, arrival_seconds, assign_adapters, text_prompt, token_prompt

_WARMUP_OUTPUT_TOKENS = 8
_OVERHEAD_PROBE_WORDS = 16


@dataclass(frozen=True)
class Load:
    """One run's questions, before they are put into a server's words."""

    lengths: tuple[Lengths, ...]
    adapters: tuple[str, ...]
    popularity: str
    concurrency: int | None
    rate: float | None
    cv: float
    prompt: str
    token_ids: range
    words: tuple[str, ...]
    seed: int
    objective: dict[str, float]
    request_timeout_seconds: float
    num_warmup: int | None = None

    @property
    def num_requests(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class PromptForm:
    """How a server takes its prompts: token ids, text or a chat; `num_overhead_tokens` it adds to the words."""

    kind: str
    num_overhead_tokens: int = 0


def build_requests(load: Load, target: Target, form: PromptForm, round_index: int) -> list[LoadRequest]:
    """The run's requests, in the order in which they are sent: the same for every server in the same round."""
    seed = load.seed + round_index
    count = load.num_requests
    chosen = (
        assign_adapters(count, len(load.adapters), load.popularity, seed) if load.adapters else [None] * count
    )
    arrivals = arrival_seconds(count, load.rate, load.cv, seed) if load.rate else [0.0] * count
    return [
        build_request(load, target, form, lengths, adapter, f"{seed}/{index}", arrival)
        for index, (lengths, adapter, arrival) in enumerate(zip(load.lengths, chosen, arrivals, strict=True))
    ]


def build_warmup(load: Load, target: Target, form: PromptForm, round_index: int) -> list[LoadRequest]:
    """`num_warmup` requests; by default as many as run at once, and one for each adapter at least."""
    count = max(load.concurrency or 1, len(load.adapters)) if load.num_warmup is None else load.num_warmup
    lengths = Lengths(load.lengths[0].prompt_tokens, _WARMUP_OUTPUT_TOKENS)
    return [
        build_request(
            load,
            target,
            form,
            lengths,
            i % len(load.adapters) if load.adapters else None,
            f"warm-up/{round_index}/{i}",
        )
        for i in range(count)
    ]


def build_request(
    load: Load,
    target: Target,
    form: PromptForm,
    lengths: Lengths,
    adapter: int | None,
    seed: str,
    arrival: float = 0.0,
) -> LoadRequest:
    """`adapter` is an index into `load.adapters`; None is the base."""
    name = None if adapter is None else load.adapters[adapter]
    body = {
        **target.body(name, adapter or 0, len(load.adapters)),
        "max_tokens": lengths.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    num_words = max(lengths.prompt_tokens - form.num_overhead_tokens, 1)
    path = "/v1/chat/completions" if form.kind == "chat" else "/v1/completions"
    if form.kind == "ids":
        body["prompt"] = token_prompt(lengths.prompt_tokens, load.token_ids, seed)
    elif form.kind == "text":
        body["prompt"] = text_prompt(num_words, load.words, seed)
    else:
        body["messages"] = [{"role": "user", "content": text_prompt(num_words, load.words, seed)}]
    return LoadRequest(path, body, lengths.prompt_tokens, lengths.output_tokens, arrival)


async def find_prompt_form(client: httpx.AsyncClient, load: Load, target: Target) -> PromptForm:
    """Ask the server once: whether it takes token ids, and what it adds to a text. Raises RuntimeError if it answers
    neither."""
    lengths = Lengths(_OVERHEAD_PROBE_WORDS, 2)

    async def probe(kind: str) -> Record:
        request = build_request(load, target, PromptForm(kind), lengths, None, "probe")
        return await send(client, request, time.perf_counter(), 0.0)

    kind = load.prompt
    if kind == "auto":
        kind = "ids" if (await probe("ids")).error is None else "text"
    record = await probe(kind)
    if record.error is not None:
        raise RuntimeError(f"{target.name} does not answer a request of kind {kind!r}: {record.error}")
    return PromptForm(kind, 0 if kind == "ids" else record.prompt_tokens - _OVERHEAD_PROBE_WORDS)
