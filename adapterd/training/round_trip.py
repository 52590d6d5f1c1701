"""The proof that what was trained is what will be served: loaded by a fresh engine, asked, and compared.

Before the first step: the reader and the base are asked whether they would take an adapter like this at all.
After the last: the written directory goes through the daemon's own registry, reader and engine, beside the bare
base, and the log probabilities of held-back answers must be the trainer's.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adapterd.adapter import read_adapter
from adapterd.config import EngineSettings
from adapterd.core import AdapterMix, Output, Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from adapterd.engine.engine import Engine
from adapterd.errors import AdapterRefused
from adapterd.model.base_config import read_config
from adapterd.model.probe import probe_family
from adapterd.render import Renderer
from adapterd.training.batches import label_logits
from adapterd.training.data import Example
from adapterd.training.errors import RoundTripFailed
from adapterd.training.network import Network

NUM_ROWS = 8
_LOAD_TIMEOUT_SECONDS = 600.0
_LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Of a token's log probability. float32 sums in another order move it by some 1e-5. In 16 bits the two paths round
differently in every layer: single unlikely tokens move by tenths, so there the mean is bounded as well."""
_LARGEST_MEAN_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


WriteAdapter = Callable[[Path, Mapping[str, torch.Tensor]], None]
"""Writes parameters by name as a PEFT directory."""


@dataclass(frozen=True)
class RoundTrip:
    """Log probabilities of the labels of some held-back rows: trained against served, served against the base's."""

    digest: str
    num_rows: int
    num_tokens: int
    largest_difference: float
    mean_difference: float
    largest_effect: float
    trained_loss: float
    served_loss: float
    base_loss: float

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens of {self.num_rows} held-back rows: largest difference of a log probability"
            f" {self.largest_difference:.1e}; the adapter moves it by up to {self.largest_effect:.2g};"
            f" loss {self.trained_loss:.4f} trained, {self.served_loss:.4f} served, {self.base_loss:.4f} without it"
        )


def check_servable(network: Network, renderer: Renderer, write: WriteAdapter) -> None:
    """Raise BaseRefused or AdapterRefused now if what is about to be trained could not be served."""
    config = read_config(network.directory, network.spec.name)
    probe_family(config, max_position=network.spec.max_model_len - 1)
    # B begins as zeros, which is no effect; any other number shows the same files to the reader.
    weights = {
        name: torch.full_like(p, 0.01) if ".lora_B." in name else p.detach()
        for name, p in network.trainable.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "probe"
        write(folder, weights)
        try:
            _read(folder, network, renderer)
        except AdapterRefused as error:
            raise AdapterRefused(
                f"what this recipe trains could not be served, so it is not trained: {error.message}"
            ) from error


@torch.no_grad()
def label_logprobs(network: Network, examples: Sequence[Example]) -> list[torch.Tensor]:
    """For each example float32 [its labels] on the CPU, as the network in training says it."""
    found = []
    for example in examples:
        batch = network.batch([example])
        with network.compute():
            logprobs = label_logits(network.model, batch)[0].log_softmax(-1)
        found.append(logprobs.gather(-1, batch.labels[0][:, None])[:, 0].float().cpu())
    return found


def prove_round_trip(
    directory: Path,
    *,
    name: str,
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    examples: Sequence[Example],
    trained: Sequence[torch.Tensor],
    quantization: str,
    rank: int,
) -> RoundTrip:
    """Serve `directory` (whose last part is `name`) and the bare base, held as in training; compare with `trained`.

    Raises RoundTripFailed naming the figure, and whatever the daemon raises for what it refuses.
    """
    settings = proof_settings(
        directory,
        base=base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        rank=rank,
        longest=max(example.num_tokens for example in examples),
    )
    daemon = Daemon.build(settings)
    daemon.registry.start()
    try:
        daemon.registry.wait_loaded(_LOAD_TIMEOUT_SECONDS)
        model = daemon.registry.resolve_waiting(f"base:{name}", _LOAD_TIMEOUT_SECONDS)
        lease = daemon.registry.lease(model.mix)
        try:
            served = _ask(daemon.engine, examples, model.mix)
            bare = _ask(daemon.engine, examples, ())
        finally:
            lease.release()
    finally:
        daemon.registry.stop()
    return _compare(model.digest, trained, served, bare, dtype)


def proof_settings(
    directory: Path,
    *,
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    rank: int,
    longest: int,
) -> EngineSettings:
    """The daemon that proves the one adapter in `directory`, of this rank, on rows of `longest` tokens at most."""
    return EngineSettings.model_validate(
        {
            "base": base,
            "adapters": (directory,),
            "dtype": "float32" if dtype == torch.float32 else "bfloat16",
            "device": "cuda" if device.type == "cuda" else "cpu",
            "quantization": quantization,
            "max_num_seqs": NUM_ROWS,
            "max_model_len": longest,
            # Not by what is free, of which a share may be less than the adapter. The second one's room is for
            # DoRA's magnitudes, which lie in pages of their own.
            "max_loras": 2,
            "max_lora_rank": rank,
        }
    )


def _ask(engine: Engine, examples: Sequence[Example], mix: AdapterMix) -> list[torch.Tensor]:
    """Log probabilities of each example's labels, read as those of a prompt."""
    for number, example in enumerate(examples):
        engine.submit(
            Request(
                id=RequestId(f"proof-{number}"),
                prompt_token_ids=(*example.prompt_ids, *example.answer_ids),
                params=SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0),
                mix=mix,
                eos_token_ids=frozenset(),
                arrival_seconds=time.monotonic(),
            )
        )
    outputs: dict[str, Output] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, output)
    found = []
    for number, example in enumerate(examples):
        logprobs = outputs[f"proof-{number}"].prompt_logprobs[-len(example.answer_ids) :]
        if [entry.token_id for entry in logprobs] != list(example.answer_ids):
            raise AssertionError("the engine's prompt log probabilities are those of other tokens")
        found.append(torch.tensor([entry.logprob for entry in logprobs]))
    return found


def _compare(
    digest: str,
    trained: Sequence[torch.Tensor],
    served: Sequence[torch.Tensor],
    bare: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> RoundTrip:
    ours, theirs, base = torch.cat(list(trained)), torch.cat(list(served)), torch.cat(list(bare))
    difference, effect = (ours - theirs).abs(), (theirs - base).abs()
    result = RoundTrip(
        digest=digest,
        num_rows=len(trained),
        num_tokens=len(ours),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_effect=float(effect.max()),
        trained_loss=float(-ours.mean()),
        served_loss=float(-theirs.mean()),
        base_loss=float(-base.mean()),
    )
    if not all(math.isfinite(value) for value in (result.largest_difference, result.largest_effect)):
        raise RoundTripFailed(f"the served adapter gives no numbers: {result}")
    if result.largest_effect == 0.0:
        raise RoundTripFailed(f"the adapter changes nothing of what the base answers: {result}")
    if (
        result.largest_difference > _LARGEST_DIFFERENCE[dtype]
        or result.mean_difference > _LARGEST_MEAN_DIFFERENCE[dtype]
    ):
        raise RoundTripFailed(f"the served adapter does not answer as the trained one does: {result}")
    return result


def _read(folder: Path, network: Network, renderer: Renderer) -> None:
    read_adapter(
        folder,
        name=folder.name,
        spec=network.spec,
        tokenizer=renderer.identity,
        base_fingerprint=network.fingerprint,
        base_weights=lambda path: _base_weight(network, path),
    )


def _base_weight(network: Network, path: str) -> torch.Tensor:
    """The frozen base's own tensor; PEFT has put it one module deeper where it trains."""
    parent, _, last = path.rpartition(".")
    module = network.model.get_submodule(parent)
    found = getattr(getattr(module, "base_layer", module), last)
    assert isinstance(found, torch.Tensor)
    return found
