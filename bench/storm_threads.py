"""The threads of `bench.load_storm`: operators that change which adapters there are, askers that use them.

Everything is drawn from a seed, but how the threads meet is not. Each keeps what it was answered; `wrong_answer` and
`wrong_outcome` say afterwards what of that must not be.
"""

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ALIASES = ("stable", "canary")
UNLOAD_SECONDS = 5.0
"""How long an unload waits for requests that run before it says who holds the memory."""

CHANGES: Mapping[str, int] = {
    "load (vLLM)": 2,
    "load in place (vLLM)": 3,
    "load (SGLang)": 1,
    "load": 1,
    "load in place": 3,
    "load pinned": 1,
    "unload (vLLM)": 2,
    "unload": 2,
    "delete": 1,
    "pin": 2,
    "unpin": 3,
    "prefetch": 1,
    "alias": 3,
    "unalias": 1,
    "rollback": 1,
}
"""Kinds of operations and how often each is drawn."""

_CLEAN = {200, 201, 202, 404, 409, 429}
_REFUSALS = ("already been loaded", "already loaded", "does not exist", "no version")
"""What vLLM's and SGLang's calls say with their one status, 400, where ours have 404 and 409."""


@dataclass(frozen=True)
class Outcome:
    """What one operation came to; `text` is the body's beginning. Status 0: no answer, and `text` says why."""

    kind: str
    name: str
    status: int
    text: str
    seconds: float
    retry_after: str | None = None


@dataclass
class Asked:
    """One request: `is_cut` where the client went away after the first token. Status 0 as above."""

    name: str
    is_cut: bool = False
    status: int = 0
    digest: str = ""
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    retry_after: str | None = None


def wrong_refusal(status: int, text: str, retry_after: str | None) -> str | None:
    """What must not be about a 429; None if all is well. No room is said with when to come back, and why."""
    if status != 429:
        return None
    if retry_after is None or not retry_after.isdecimal() or int(retry_after) < 1:
        return f"a 429 with Retry-After {retry_after}: {text}"
    return None if "pinned adapters take" in text else f"a 429 for another reason than pins: {text}"


def wrong_outcome(outcome: Outcome, max_seconds: float) -> str | None:
    """What must not be about an operation; None if all is well."""
    refused = outcome.status == 400 and any(part in outcome.text for part in _REFUSALS)
    if outcome.status not in _CLEAN and not refused:
        return f"{outcome.kind} {outcome.name}: HTTP {outcome.status}: {outcome.text}"
    refusal = wrong_refusal(outcome.status, outcome.text, outcome.retry_after)
    if refusal is not None:
        return f"{outcome.kind} {outcome.name}: {refusal}"
    if outcome.seconds > max_seconds:
        return f"{outcome.kind} {outcome.name} took {outcome.seconds:.1f} s"
    return None


def wrong_answer(
    asked: Asked, references: Mapping[str, Sequence[int]], max_seconds: float, *, may_be_gone: bool
) -> str | None:
    """What must not be about an answer; None if all is well.

    references: digest -> the answer of that version, for every version that the name ever means.
    """
    if asked.status != 200:
        if not may_be_gone or asked.status not in _CLEAN:
            return f"{asked.name}: HTTP {asked.status}: {asked.error}"
        refusal = wrong_refusal(asked.status, asked.error or "", asked.retry_after)
        return None if refusal is None else f"{asked.name}: {refusal}"
    if asked.error is not None:
        return f"{asked.name}: in the stream: {asked.error}"
    if asked.digest not in references:
        return f"{asked.name}: answered by {asked.digest[:12] or 'no version'}, which it never was"
    expected = list(references[asked.digest])
    if asked.token_ids != (expected[: len(asked.token_ids)] if asked.is_cut else expected):
        return f"{asked.name} {asked.digest[:12]}: {asked.token_ids} is not {expected}"
    if asked.seconds > max_seconds:
        return f"{asked.name}: took {asked.seconds:.1f} s"
    return None


def ask(client: httpx.Client, model: str, prompt: Sequence[int], num_tokens: int, *, cut: bool) -> Asked:
    """A greedy completion, streamed. `model` is a name, or NAME@ALIAS."""
    asked = Asked(model.partition("@")[0], is_cut=cut)
    body = {
        "model": f"base:{model}",
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    began = time.perf_counter()
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            asked.status = response.status_code
            if response.status_code == 200:
                asked.digest = response.headers.get("x-adapterd-digest", "")
                _read_answer(response, asked)
            else:
                asked.error = response.read().decode()[:300]
                asked.retry_after = response.headers.get("retry-after")
    except httpx.HTTPError as error:
        asked.status, asked.error = 0, f"{type(error).__name__}: {error}"
    asked.seconds = time.perf_counter() - began
    return asked


def _read_answer(response: httpx.Response, asked: Asked) -> None:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if not data:
            continue
        try:
            chunk = json.loads(data)
        except ValueError:
            asked.error = f"no JSON: {data[:300]}"
            return
        if "error" in chunk:
            asked.error = json.dumps(chunk["error"])[:300]
        for choice in chunk.get("choices", ()):
            asked.token_ids += choice.get("token_ids") or []
        if asked.is_cut and asked.token_ids:
            return
    asked.error = asked.error or "the stream was cut off"


class Asker(threading.Thread):
    """Asks one question after the other until `stop`; `cut_share` of the answers are abandoned half-way."""

    def __init__(
        self,
        url: str,
        models: Sequence[str],
        prompt: Sequence[int],
        num_tokens: int,
        seed: str,
        stop: threading.Event,
        timeout_seconds: float,
        cut_share: float,
    ) -> None:
        super().__init__(name=f"asker-{seed}", daemon=True)
        self.asked: list[Asked] = []
        self._client = httpx.Client(base_url=url, timeout=timeout_seconds)
        self._models = models
        self._prompt = prompt
        self._num_tokens = num_tokens
        self._draw = random.Random(seed)
        self._stop_asking = stop
        self._cut_share = cut_share

    def run(self) -> None:
        with self._client:
            while not self._stop_asking.is_set():
                model, cut = self._draw.choice(self._models), self._draw.random() < self._cut_share
                self.asked.append(ask(self._client, model, self._prompt, self._num_tokens, cut=cut))


def change(
    client: httpx.Client, kind: str, name: str, method: str, path: str, body: dict[str, Any] | None
) -> Outcome:
    """One operation; status 0 where there was no answer."""
    began = time.perf_counter()
    retry_after: str | None = None
    try:
        response = client.request(method, path, json=body)
        status, text = response.status_code, response.text[:300]
        retry_after = response.headers.get("retry-after")
    except httpx.HTTPError as error:
        status, text = 0, f"{type(error).__name__}: {error}"
    return Outcome(kind, name, status, text, time.perf_counter() - began, retry_after)


class Operator(threading.Thread):
    """Makes `num_operations` changes, one after the other. contents: name -> the folders it may be loaded from."""

    def __init__(
        self,
        url: str,
        contents: Mapping[str, Sequence[Path]],
        num_operations: int,
        seed: str,
        timeout_seconds: float,
    ) -> None:
        super().__init__(name=f"operator-{seed}", daemon=True)
        self.outcomes: list[Outcome] = []
        self._client = httpx.Client(base_url=url, timeout=timeout_seconds)
        self._contents = contents
        self._num_operations = num_operations
        self._draw = random.Random(seed)

    def run(self) -> None:
        kinds, weights = list(CHANGES), list(CHANGES.values())
        with self._client:
            for _ in range(self._num_operations):
                (kind,) = self._draw.choices(kinds, weights)
                name = self._draw.choice(list(self._contents))
                self.outcomes.append(self._change(kind, name))

    def _change(self, kind: str, name: str) -> Outcome:
        return change(self._client, kind, name, *self._call(kind, name))

    def _call(self, kind: str, name: str) -> tuple[str, str, dict[str, Any] | None]:
        """(method, path, body) of one operation."""
        source = str(self._draw.choice(self._contents[name]))
        alias = self._draw.choice(ALIASES)
        own, base = f"/v1/adapters/{name}", {"lora_name": name}
        calls: dict[str, tuple[str, str, dict[str, Any] | None]] = {
            "load (vLLM)": ("POST", "/v1/load_lora_adapter", base | {"lora_path": source}),
            "load in place (vLLM)": (
                "POST",
                "/v1/load_lora_adapter",
                base | {"lora_path": source, "load_inplace": True},
            ),
            "load (SGLang)": ("POST", "/load_lora_adapter", base | {"lora_path": source}),
            "load": ("POST", "/v1/adapters", {"name": name, "source": source}),
            "load in place": ("POST", "/v1/adapters", {"name": name, "source": source, "replace": True}),
            "load pinned": (
                "POST",
                "/v1/adapters",
                {"name": name, "source": source, "replace": True, "pinned": True},
            ),
            "unload (vLLM)": ("POST", "/v1/unload_lora_adapter", base),
            "unload": ("POST", f"{own}/unload", {"deadline_seconds": UNLOAD_SECONDS}),
            "delete": ("DELETE", f"{own}?deadline_seconds={UNLOAD_SECONDS}", None),
            "alias": ("POST", f"{own}/alias", {"alias": alias}),
            "unalias": ("DELETE", f"{own}/aliases/{alias}", None),
            **{verb: ("POST", f"{own}/{verb}", {}) for verb in ("pin", "unpin", "prefetch", "rollback")},
        }
        return calls[kind]
