"""The clock of one response, and what it adds to the metrics however it ends."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from adapterd.core import Output, Request

Outcome = Literal["finished", "cancelled", "failed"]


class AdapterCounters(Protocol):
    """Where it is added; `metrics.Metrics` is the real thing."""

    clock: Callable[[], float]

    def count_for(self, adapter: str, name: str, *labels: str, by: float = 1) -> None: ...
    def time_for(self, adapter: str, name: str, seconds: float) -> None: ...
    def time(self, name: str, seconds: float) -> None: ...


class RequestRecord:
    """`close` it once, however the response ended. `adapter` is what it ran, "base" for the bare base."""

    def __init__(self, metrics: AdapterCounters, adapter: str, requests: Sequence[Request]) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._arrival_seconds = requests[0].arrival_seconds
        self._num_unfinished = sum(request.num_sequences for request in requests)
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._last_token_seconds: dict[tuple[str, int], float] = {}
        self._has_failed = False

    def observe(self, output: Output) -> None:
        now = self._metrics.clock()
        key = (output.request_id, output.index)
        if output.token_ids:
            if key in self._last_token_seconds:
                gap = (now - self._last_token_seconds[key]) / len(output.token_ids)
                self._metrics.time_for(self._adapter, "adapterd_inter_token_seconds", gap)
            elif not self._last_token_seconds:
                ttft = now - self._arrival_seconds
                self._metrics.time_for(self._adapter, "adapterd_time_to_first_token_seconds", ttft)
            self._last_token_seconds[key] = now
            self._metrics.count_for(self._adapter, "adapterd_output_tokens_total", by=len(output.token_ids))
        if output.finish_reason is not None:
            self._num_unfinished -= 1
            self._has_failed = self._has_failed or output.finish_reason in ("abort", "overloaded", "error")

    def close(self) -> None:
        outcome: Outcome = "finished"
        if self._has_failed:
            outcome = "failed"
        elif self._num_unfinished:
            outcome = "cancelled"
        metrics, adapter = self._metrics, self._adapter
        metrics.count_for(adapter, "adapterd_requests_total", outcome)
        metrics.count_for(adapter, "adapterd_prompt_tokens_total", by=self._num_prompt_tokens)
        metrics.time("adapterd_request_seconds", metrics.clock() - self._arrival_seconds)
