"""A PEFT directory becomes an Adapter, checked against the base it is for (`adapter_writer.py` goes back).

What the directory asks for is applied exactly, or it is refused naming the file, the field and the way out.
Host tensors only: device memory is `model/lora.py`'s, names and versions are `registry.py`'s.
"""

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType

import torch

from adapterd.adapter_files import AdapterFiles, check_seal
from adapterd.core import AdapterDigest, AdapterId, BaseMatch, BaseSpec
from adapterd.deltas import (
    Edit,
    EmbeddingMatrices,
    ExpertMatrices,
    LoraMatrices,
    OutputAffine,
    field_that_cannot_be_added,
    tensors_of,
)
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.peaks import peak_of
from adapterd.peft_config import parse_json_object
from adapterd.peft_deltas import BaseWeights, Deltas, make_deltas
from adapterd.peft_proof import AdapterProver
from adapterd.peft_targets import PREFIX, ExpectedTensor, Layouts, Targets
from adapterd.proof import Proof
from adapterd.sidecars import Sidecars, read_sidecars
from adapterd.sources.source import NO_HASHES, Hashes
from adapterd.tensor_file import TensorEntry, read_tensors
from adapterd.token_table import TokenizerIdentity

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """One immutable version of one adapter, on the host.

    `modules` are LoRA on linears; `edits` is what it changes beside them. `chat_template` and `eos_token_ids` are
    None where the base's own hold. `generation_defaults` are what a request that says nothing gets: temperature,
    top_p, top_k, min_p, repetition_penalty. `proof` says how it was compared with PEFT, once it was.
    """

    id: AdapterId
    path: Path
    modules: tuple[LoraMatrices, ...]
    max_rank: int
    num_bytes: int
    base_model_name: str | None
    chat_template: str | None
    eos_token_ids: frozenset[int] | None
    generation_defaults: Mapping[str, float | int]
    base_match: BaseMatch = "shapes"
    edits: tuple[Edit, ...] = ()
    has_effect: bool = True
    proof: Proof | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the paths of all modules that it changes, in alphabetical order."""
        return tuple(sorted({delta.module.rpartition(".")[2] for delta in (*self.modules, *self.edits)}))

    @property
    def field_that_cannot_be_added(self) -> str | None:
        """The configuration key that keeps this adapter out of weighted sums; None if it may be in one."""
        fields = [field_that_cannot_be_added(edit) for edit in self.edits]
        return next((field for field in fields if field is not None), None)


def read_adapter(
    directory: Path,
    *,
    name: str,
    spec: BaseSpec,
    tokenizer: TokenizerIdentity,
    base_fingerprint: str | None = None,
    root: Path | None = None,
    hashes: Hashes = NO_HASHES,
    base_weights: BaseWeights | None = None,
    prover: AdapterProver | None = None,
    layouts: Layouts | None = None,
) -> Adapter:
    """Read the PEFT directory at `directory` for the base `spec`; raises AdapterRefused.

    Symbolic links are followed first and must end below `root` (the directory itself, if none is given).
    Each file is read once and hashed, and what was hashed is what is used. `base_fingerprint` is compared
    with the one an adapterd.json holds, if both are there. `hashes` are those that somebody declared; if they
    are more than the weights', no other file may be there. `base_weights` gives the base's tensors to what
    cannot be understood without them (DoRA, trained biases); such adapters are refused where there are none.
    `prover` compares each module with PEFT's own layer. `layouts` remembers what configurations ask of this base.
    """
    files = AdapterFiles(directory, root=root, adapter=name, hashes=hashes)
    files.refuse_pickles()
    config_bytes = files.read(CONFIG_FILE)
    if config_bytes is None:
        raise AdapterRefused(f"adapter {name!r}: {directory} has no {CONFIG_FILE}, so it is no PEFT adapter")
    layout = (Layouts(spec) if layouts is None else layouts).of(config_bytes, adapter=name)
    config, targets = layout.config, layout.targets
    weights_path = files.path(WEIGHTS_FILE)
    if weights_path is None:
        raise AdapterRefused(f"adapter {name!r}: {directory} has no {WEIGHTS_FILE}")
    tensors, weights_digest = read_tensors(
        weights_path,
        adapter=name,
        check=lambda entries: _check_entries(entries, layout.expected, targets, spec, name),
    )
    files.check(WEIGHTS_FILE, weights_digest)
    digests = {CONFIG_FILE: hashlib.sha256(config_bytes).hexdigest(), WEIGHTS_FILE: weights_digest}
    base_match = check_seal(files.read(SEAL_FILE), digests, base_fingerprint, spec, name)
    peak = _check_values(tensors, name)
    deltas = make_deltas(tensors, targets, config, spec, base_weights, adapter=name)
    _check_strength(deltas, tensors, peak, spec, name)
    sidecars = read_sidecars(files.read, spec=spec, tokenizer=tokenizer, adapter=name)
    has_effect = _has_effect(deltas)
    if not has_effect:
        _logger.warning("adapter %r has no effect: it adds nothing but zeros", name)
    digest = _digest(deltas, tensors, sidecars)
    proof = None
    if prover is not None:
        fields = parse_json_object(config_bytes, file=CONFIG_FILE, adapter=name)
        proof = prover.prove(digest, fields, tensors, deltas, has_effect=has_effect, adapter=name)
    held = [tensor for delta in (*deltas.modules, *deltas.edits) for tensor in tensors_of(delta)]
    return Adapter(
        id=AdapterId(digest, name),
        path=directory,
        modules=deltas.modules,
        max_rank=max((delta.rank for delta in _factors(deltas)), default=0),
        num_bytes=sum(tensor.nbytes for tensor in held),
        base_model_name=config.base_model_name,
        chat_template=sidecars.chat_template,
        eos_token_ids=sidecars.eos_token_ids,
        generation_defaults=MappingProxyType(dict(sidecars.generation_defaults)),
        base_match=base_match,
        edits=deltas.edits,
        has_effect=has_effect,
        proof=proof,
    )


def _factors(deltas: Deltas) -> list[LoraMatrices | EmbeddingMatrices | ExpertMatrices]:
    return [
        delta
        for delta in (*deltas.modules, *deltas.edits)
        if isinstance(delta, LoraMatrices | EmbeddingMatrices | ExpertMatrices)
    ]


def _check_entries(
    entries: Sequence[TensorEntry],
    expected: Mapping[str, ExpectedTensor],
    targets: Targets,
    spec: BaseSpec,
    adapter: str,
) -> None:
    """Every tensor is one that PEFT would read, in the shape that follows from its rank, and none is missing."""
    for entry in entries:
        wanted = expected.get(entry.name)
        if wanted is None:
            raise AdapterRefused(f"adapter {adapter!r}: {_why_unexpected(entry.name, targets, spec)}")
        if entry.shape != wanted.shape:
            given = f"with rank {wanted.rank} " if wanted.rank is not None else ""
            raise AdapterRefused(
                f"adapter {adapter!r}: tensor {entry.name!r} has shape {list(entry.shape)}; {given}on this base it must"
                f" be {list(wanted.shape)} (check r, rank_pattern, and that the base is right)"
            )
    found = {entry.name for entry in entries}
    if not found:
        raise AdapterRefused(f"adapter {adapter!r}: {WEIGHTS_FILE} adapts no module of the base")
    for name, tensor in expected.items():
        other = _other_factor(name)
        if name in found or not (tensor.is_required or other in found):
            continue
        if other is None or other in found:
            raise AdapterRefused(f"adapter {adapter!r}: {name!r} is missing from {WEIGHTS_FILE}")
        module = name[len(PREFIX) :].rpartition(".lora_")[0]
        raise AdapterRefused(
            f"adapter {adapter!r}: {CONFIG_FILE} targets {module!r}, but {WEIGHTS_FILE} has no tensors for it"
        )


def _other_factor(name: str) -> str | None:
    """The name of A for B, and of B for A."""
    for one, other in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        for ending, replacement in ((one, other), (other, one)):
            if name.endswith(f".{ending}"):
                return name.removesuffix(ending) + replacement
    return None


def _why_unexpected(name: str, targets: Targets, spec: BaseSpec) -> str:
    """Why PEFT would not read a tensor of this name for this configuration and base."""
    for ending, described in (
        (".lora_A.weight", "linear"),
        (".lora_B.weight", "linear"),
        (".lora_B.bias", "linear"),
        (".lora_embedding_A", "embedding"),
        (".lora_embedding_B", "embedding"),
        (".lora_magnitude_vector", "linear"),
        (".token_adapter.trainable_tokens_delta", "embedding"),
    ):
        if not (name.startswith(PREFIX) and name.endswith(ending)):
            continue
        module = name[len(PREFIX) : -len(ending)]
        known = [*spec.lora_targets, *filter(None, (spec.modules.embedding, spec.modules.head))]
        if module not in known and module.replace(".base_layer", "") not in spec.modules.input_axes:
            near = difflib.get_close_matches(module, known, n=1)
            hint = f"; the nearest it has is {near[0]!r}" if near else ""
            return f"the base {spec.name!r} has no {described} {module!r}{hint} (tensor {name!r})"
        if ending == ".lora_magnitude_vector":
            return f"tensor {name!r} is DoRA's, but {CONFIG_FILE} has no use_dora for this module"
        if ending == ".lora_B.bias":
            return f"tensor {name!r} is a bias of lora_B, but {CONFIG_FILE} has no lora_bias"
        return (
            f"tensor {name!r} adapts a module that {CONFIG_FILE} does not target, so PEFT would not apply it"
            f" to this {described}"
        )
    if name.endswith(".bias"):
        return (
            f"tensor {name!r} is a bias, which {CONFIG_FILE} does not train (bias) or the base does not have"
        )
    if name.startswith(PREFIX) and ".lora_" not in name:
        return (
            f"tensor {name!r} is of a module trained or saved beside the adapter, which {CONFIG_FILE} does not name"
            " in modules_to_save"
        )
    return f"tensor {name!r} is not named as PEFT names it: {PREFIX}MODULE.lora_A.weight"


def _check_values(tensors: Mapping[str, torch.Tensor], adapter: str) -> float:
    """The largest value of the file."""
    peak = peak_of(tensors.values())
    if not isfinite(peak):
        name = next(name for name, tensor in tensors.items() if not isfinite(peak_of([tensor])))
        raise AdapterRefused(f"adapter {adapter!r}: {name!r} holds NaN or infinity")
    return peak


def _check_strength(
    deltas: Deltas, tensors: Mapping[str, torch.Tensor], peak: float, spec: BaseSpec, adapter: str
) -> None:
    """Nothing that the base's compute type cannot hold. `peak` is the largest value of the file's `tensors`."""
    largest = torch.finfo(getattr(torch, spec.dtype)).max
    everything = (*deltas.modules, *deltas.edits)
    of_the_file = {id(tensor) for tensor in tensors.values()}
    made = [t for delta in everything for t in tensors_of(delta) if id(t) not in of_the_file]
    peak = max(peak, peak_of(made))
    strength = max((abs(delta.scale) * delta.rank for delta in _factors(deltas)), default=0.0)
    if max(peak, strength, strength * peak * peak) <= largest:
        return  # nearly always: no module alone can reach beyond what all of them together do not
    for delta in everything:
        peaks = [peak_of([tensor]) for tensor in tensors_of(delta)]
        if isinstance(delta, LoraMatrices | EmbeddingMatrices | ExpertMatrices):
            peaks += [abs(delta.scale), peaks[0] * peaks[1] * delta.rank * abs(delta.scale)]
        if not max(peaks) <= largest:
            raise AdapterRefused(
                f"adapter {adapter!r}: the update of {delta.module!r} reaches values beyond {spec.dtype}"
            )


def _has_effect(deltas: Deltas) -> bool:
    """Whether any factor, offset or copied weight is there that is not zero."""
    if any(delta.scale and delta.a.any() and delta.b.any() for delta in _factors(deltas)):
        return True
    for edit in deltas.edits:
        if isinstance(edit, OutputAffine):
            changed = edit.factor is not None and bool((edit.factor - 1).abs().max() > 1e-6)
            if changed or edit.offset is not None:
                return True
        elif not isinstance(edit, LoraMatrices | EmbeddingMatrices | ExpertMatrices):
            return True
    return False


def _digest(deltas: Deltas, tensors: Mapping[str, torch.Tensor], sidecars: Sidecars) -> AdapterDigest:
    """sha256 over all that changes an answer, the same wherever and however the files lie, on any machine.

    Edits count by the file's own tensors: what is made of them beside the base's weights is rounded by the machine.
    """
    digest = hashlib.sha256()
    for matrices in deltas.modules:
        for tensor in (matrices.a, matrices.b):
            digest.update(json.dumps([matrices.module, matrices.scale, *_described(tensor)]).encode())
            digest.update(_bytes(tensor))
    if deltas.edits:
        for edit in deltas.edits:
            digest.update(json.dumps(_shape_of(edit)).encode())
        counted = {f"{PREFIX}{m.module}.lora_{side}.weight" for m in deltas.modules for side in "AB"}
        for name in sorted(tensors.keys() - counted - deltas.unchanged):
            digest.update(json.dumps([name, *_described(tensors[name])]).encode())
            digest.update(_bytes(tensors[name]))
    eos = None if sidecars.eos_token_ids is None else sorted(sidecars.eos_token_ids)
    digest.update(
        json.dumps([sidecars.chat_template, eos, sorted(sidecars.generation_defaults.items())]).encode()
    )
    return AdapterDigest(digest.hexdigest())


def _shape_of(edit: Edit) -> list[object]:
    """What of an edit is no tensor. What it does not have (None) is left out, so that new fields change no digest."""
    return [
        type(edit).__name__,
        *(value for value in vars(edit).values() if isinstance(value, str | float | tuple)),
    ]


def _described(tensor: torch.Tensor) -> list[object]:
    return [str(tensor.dtype), list(tensor.shape)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Uncopied, in the order of the elements."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
