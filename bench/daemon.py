"""Our own daemon under a bench: started as a person starts it, on a free port, and asked for its counters."""

import contextlib
import random
import re
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

import httpx

from bench.client import LoadRequest
from bench.target import Target
from bench.workload import token_prompt


def adapterd(base: Path, adapters: Path | None, *flags: str) -> Target:
    """`adapterd serve` on a base directory and a directory of adapters; flags as `--name=value`."""
    port = free_port()
    where = () if adapters is None else ("--adapters", str(adapters))
    given = ("--base", str(base), "--served-name", "base", *where, "--port", str(port), *flags)
    return Target(
        name="adapterd",
        url=f"http://127.0.0.1:{port}",
        model="base",
        adapter_model="{model}:{adapter}",
        start="$PYTHON -m adapterd serve " + shlex.join(given),
        ready="/readyz",
    )


def free_port() -> int:
    """One that outgoing connections do not take while no server listens on it."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a series over its labels, or over those that have these; 0 where nothing was counted yet."""
    text = httpx.get(url + "/metrics", timeout=30).text
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labelled, value in found if all(label in labelled for label in wanted))


def completion(
    model: str,
    prompt_tokens: int,
    output_tokens: int,
    token_ids: range,
    seed: str,
    arrival_seconds: float = 0.0,
) -> LoadRequest:
    """A greedy completion of random ids, of exactly so many tokens."""
    body = {
        "model": model,
        "prompt": token_prompt(prompt_tokens, token_ids, seed),
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    return LoadRequest("/v1/completions", body, prompt_tokens, output_tokens, arrival_seconds)


def folder_bytes(directories: Sequence[Path]) -> int:
    """Bytes of the weights in adapters' folders."""
    return sum((directory / "adapter_model.safetensors").stat().st_size for directory in directories)
