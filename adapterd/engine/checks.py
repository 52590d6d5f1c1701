"""What a request must be to be taken, by lengths, token ids and adapter memory; told in the caller's thread."""

from collections.abc import Mapping

from adapterd.core import AdapterId, AdapterMix, Request
from adapterd.engine.seams import EngineMemory, HostWeights
from adapterd.errors import AdapterRefused, ContextLengthExceeded, InvalidRequest, Overloaded

PINNED_RETRY_SECONDS = 10
"""What clients are told to wait where all adapter memory is pinned: until an operator has done something."""


class RequestChecks:
    """Against one engine's limits; it remembers nothing."""

    def __init__(
        self, memory: EngineMemory, weights: HostWeights, *, vocab_size: int, max_model_len: int
    ) -> None:
        self._memory = memory
        self._weights = weights
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def check_length(self, request: Request) -> None:
        """Raise ContextLengthExceeded unless prompt and answer fit the context together."""
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if num_prompt_tokens + max_tokens > self._max_model_len or num_prompt_tokens == 0:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}; together they must "
                f"be within the context of {self._max_model_len} tokens, and the prompt must not be empty",
                param="max_tokens" if 0 < num_prompt_tokens < self._max_model_len else request.prompt_field,
            )

    def check_token_ids(self, request: Request) -> None:
        """Raise InvalidRequest for ids beyond the embedding: one would fail the step, and everyone in it."""
        params = request.params
        for field, ids in (
            (request.prompt_field, request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(token for token, _ in params.logit_bias)),
        ):
            lowest, highest = min(ids, default=0), max(ids, default=0)
            if lowest < 0 or highest >= self._vocab_size:
                wrong = lowest if lowest < 0 else highest
                raise InvalidRequest(
                    f"token id {wrong} is outside the vocabulary of {self._vocab_size} tokens", param=field
                )

    def pages_of(self, mix: AdapterMix) -> dict[AdapterId, int]:
        """What each adapter of a mix takes whose weights are held.

        Raises AdapterRefused for a mix that can never be resident at once: it would wait for ever.
        """
        memory = self._memory
        pages = {adapter_id: self._weights.num_pages(adapter_id) for adapter_id, _ in mix}
        if sum(pages.values()) > memory.num_adapter_pages:
            names = " and ".join(f"'{adapter_id.name}'" for adapter_id in pages)
            raise AdapterRefused(
                f"{names} need {self._mib(sum(pages.values()))} of adapter memory at once and the budget is "
                f"{self._mib(memory.num_adapter_pages)}; start with a larger --adapter-memory",
                param="model",
            )
        return pages

    def check_beside_pinned(
        self, pages: Mapping[AdapterId, int], pinned_pages: Mapping[AdapterId, int]
    ) -> None:
        """Raise Overloaded where pinned adapters leave too little."""
        if not pages or not pinned_pages:
            return
        others = sum(count for pinned, count in pinned_pages.items() if pinned not in pages)
        if others + sum(pages.values()) > self._memory.num_adapter_pages:
            names = " and ".join(f"'{adapter_id.name}'" for adapter_id in pages)
            raise Overloaded(
                f"no adapter memory for {names}: {self._mib(sum(pages.values()))} are needed, and pinned adapters "
                f"take {self._mib(others)} of {self._mib(self._memory.num_adapter_pages)}; unpin one, or start with "
                "a larger --adapter-memory",
                retry_after_seconds=PINNED_RETRY_SECONDS,
            )

    def _mib(self, num_pages: int) -> str:
        return f"{num_pages * self._memory.adapter_page_bytes / 2**20:.1f} MiB"
