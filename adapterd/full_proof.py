"""The whole proof of an adapter: the engine that serves against PEFT over transformers' own forward, in float32.

Log probabilities at every position of some prompts, and greedy answers, the adapter's and the bare base's in one
batch. It holds the base a second time, so it is a command of its own and no part of a serving process.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adapterd.core import BASE_MIX, AdapterMix, BaseSpec, Output, Request, RequestId, SamplingParams
from adapterd.daemon import Daemon, DaemonSettings
from adapterd.deltas import ReplacedRows
from adapterd.errors import AdapterRefused, ConfigError
from adapterd.model.find import find_base
from adapterd.model.int8 import round_linears
from adapterd.proof import Verdict

_PROMPT_LENGTHS = (7, 19, 40)
_NUM_ANSWER_TOKENS = 12
_MAX_LOGPROBS = 1024
"""Likeliest tokens compared at each position; smaller vocabularies are compared whole."""
_EXACT = 1e-3
"""In log probability. float32 sums in another order differ by some 1e-5 over a whole model."""
_TIE = 1e-3
"""Greedy answers are compared up to where the reference's two likeliest tokens are as close as this."""
_LOAD_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class FullProof:
    """`max_error` and `base_error` are the largest differences in log probability, with the adapter and without.

    On a base of 16 bits the bare base's own error is the measure: twice that, and 0.05, is within bound.
    PEFT computes over the base that is served: in int8, over its rounded weights.
    """

    adapter: str
    digest: str
    base: str
    dtype: str
    verdict: Verdict
    max_error: float
    base_error: float
    num_positions: int
    num_logprobs: int
    num_tokens_equal: int
    num_tokens: int
    has_effect: bool

    def __str__(self) -> str:
        of_vocabulary = f"{self.num_positions} positions x {self.num_logprobs} log probabilities"
        lines = [
            f"{self.adapter} ({self.digest[:12]}) on {self.base}, {self.dtype}: {self.verdict}",
            f"  {of_vocabulary}: largest difference {self.max_error:.2g} (bare base {self.base_error:.2g})",
            f"  greedy answers: {self.num_tokens_equal} of {self.num_tokens} tokens equal",
        ]
        return "\n".join(lines if self.has_effect else [*lines, "  it has no effect: nothing but zeros"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NotProven:
    """An adapter that is not served, and why: it has no answers to compare."""

    adapter: str
    error: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def prove_adapters(settings: DaemonSettings, names: Sequence[str]) -> list[FullProof | NotProven]:
    """Prove adapters of the settings' directories, all of them if no name is given. Raises ModelNotFound."""
    with torch.inference_mode(False):
        daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        daemon.registry.wait_loaded(_LOAD_TIMEOUT_SECONDS)
        wanted = list(names) or [entry.name for entry in daemon.registry.list()]
        if not wanted:
            raise ConfigError("there is no adapter to prove; give folders of adapters", param="adapters")
        return [_try_to_prove(daemon, settings, name) for name in wanted]
    finally:
        daemon.registry.stop()


def _try_to_prove(daemon: Daemon, settings: DaemonSettings, name: str) -> FullProof | NotProven:
    try:
        return _prove(daemon, settings, name)
    except AdapterRefused as error:
        return NotProven(name, error.message)


def _prove(daemon: Daemon, settings: DaemonSettings, name: str) -> FullProof:
    entry = daemon.registry.entry(name)
    if entry.error is not None and entry.id is None:
        raise AdapterRefused(entry.error)
    resolved = daemon.registry.resolve_waiting(name, _LOAD_TIMEOUT_SECONDS)
    adapter = resolved.adapters[0]
    prompts = _prompts(daemon, [edit.token_ids for edit in adapter.edits if isinstance(edit, ReplacedRows)])
    lease = daemon.registry.lease(resolved.mix)
    try:
        found = _serve(daemon, prompts, [resolved.mix, BASE_MIX])
    finally:
        lease.release()
    directory = find_base(settings.base)
    errors: list[float] = []
    num_equal = num_tokens = 0
    for path, answers in zip((adapter.path, None), found, strict=True):
        reference = _reference(directory, path, daemon.spec)
        error = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = _logprobs(reference, prompt)
            for position, entry_ in enumerate(answer.prompt_logprobs):
                ids, values = zip(*entry_.top, strict=True)
                difference = expected[position, list(ids)] - torch.tensor(values)
                error = max(error, float(difference.abs().max()))
            if path is not None:
                equal, compared = _compare_greedy(reference, prompt, answer.token_ids)
                num_equal, num_tokens = num_equal + equal, num_tokens + compared
        errors.append(error)
        del reference
    max_error, base_error = errors
    verdict: Verdict = "refused"
    if daemon.spec.dtype == "float32" and max_error <= _EXACT and num_equal == num_tokens:
        verdict = "exact"
    elif daemon.spec.dtype != "float32" and max_error <= 2 * base_error + 0.05:
        verdict = "within bound"
    return FullProof(
        adapter=name,
        digest=adapter.id.digest,
        base=daemon.spec.name,
        dtype=daemon.spec.dtype,
        verdict=verdict,
        max_error=max_error,
        base_error=base_error,
        num_positions=sum(len(answer.prompt_logprobs) for answer in found[0]),
        num_logprobs=min(daemon.spec.vocab_size, _MAX_LOGPROBS),
        num_tokens_equal=num_equal,
        num_tokens=num_tokens,
        has_effect=adapter.has_effect,
    )


def _prompts(daemon: Daemon, trained: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Random tokens, trained ones among them, as long as the context allows."""
    generator = torch.Generator().manual_seed(0)
    room = max(daemon.engine.max_model_len - _NUM_ANSWER_TOKENS, 2)
    lengths = [min(length, room) for length in _PROMPT_LENGTHS]
    prompts = [
        torch.randint(0, daemon.spec.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]
    for prompt, token_ids in zip(prompts, [ids for ids in trained for _ in prompts], strict=False):
        for i in range(0, len(prompt), 2):
            prompt[i] = token_ids[i % len(token_ids)]
    return prompts


@dataclass(frozen=True)
class _Answer:
    token_ids: tuple[int, ...]
    prompt_logprobs: tuple[Any, ...]


def _serve(daemon: Daemon, prompts: Sequence[list[int]], mixes: Sequence[AdapterMix]) -> list[list[_Answer]]:
    """Everything in one batch; by mix, then by prompt."""
    num_logprobs = min(daemon.spec.vocab_size, _MAX_LOGPROBS)
    params = SamplingParams(
        max_tokens=_NUM_ANSWER_TOKENS, temperature=0.0, ignore_eos=True, prompt_logprobs=num_logprobs
    )
    ids = [[RequestId(f"proof-{m}-{p}") for p in range(len(prompts))] for m in range(len(mixes))]
    for row, mix in zip(ids, mixes, strict=True):
        for request_id, prompt in zip(row, prompts, strict=True):
            daemon.engine.submit(
                Request(request_id, tuple(prompt), params, mix, frozenset(), arrival_seconds=0.0)
            )
    outputs: dict[RequestId, list[Output]] = {}
    while daemon.engine.has_work():
        for output in daemon.engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return [
        [
            _Answer(
                tuple(token for output in outputs[request_id] for token in output.token_ids),
                tuple(entry for output in outputs[request_id] for entry in output.prompt_logprobs),
            )
            for request_id in row
        ]
        for row in ids
    ]


def _reference(base: Any, adapter: Any, served: BaseSpec) -> Any:
    """transformers' own model in float32 on the CPU, with the weights that are served, PEFT's adapter in it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if served.quantization == "int8":
        round_linears(model, getattr(torch, served.dtype))
        model.config.tie_word_embeddings = False  # the rounded head is no longer the embedding
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weight tying, which is what is looked at here
            with torch.inference_mode(False):
                model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def _logprobs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _compare_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """(equal tokens, tokens compared) of an answer, each predicted from the tokens that were served before it."""
    rows = _logprobs(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    top = rows.topk(2)
    equal = compared = 0
    for row, token in enumerate(answer):
        if top.values[row, 0] - top.values[row, 1] > _TIE:
            compared += 1
            equal += int(top.indices[row, 0]) == token
    return equal, compared
