"""A PEFT directory becomes an Adapter, checked against the base it is for (`adapter_writer.py` goes back).

What the directory asks for is applied exactly, or it is refused naming the file, the field and the way out.
Host tensors only: device memory is `model/lora.py`'s, names and versions are `registry.py`'s.
"""

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from adapterd.core import AdapterDigest, AdapterId, BaseMatch, BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.peft_config import PeftConfig, parse_json_object, parse_peft_config
from adapterd.sidecars import Sidecars, read_sidecars
from adapterd.sources.source import NO_HASHES, Hashes, lists_files
from adapterd.tensor_file import TensorEntry, open_regular, read_tensors
from adapterd.token_table import TokenizerIdentity

PREFIX = "base_model.model."
_MAX_JSON_BYTES = 1 << 20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraMatrices:
    """What one linear gains: y += scale * (x @ a.T) @ b.T. a: [rank, d_in]; b: [d_out, rank].

    `module` is the linear's path in the base. The scale stays a number: folded into 16-bit b it would be
    rounded twice.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One immutable version of one adapter, on the host.

    `chat_template` and `eos_token_ids` are None where the base's own hold. `generation_defaults` are what a
    request that says nothing gets: temperature, top_p, top_k, min_p, repetition_penalty.
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


def read_adapter(
    directory: Path,
    *,
    name: str,
    spec: BaseSpec,
    tokenizer: TokenizerIdentity,
    base_fingerprint: str | None = None,
    root: Path | None = None,
    hashes: Hashes = NO_HASHES,
) -> Adapter:
    """Read the PEFT directory at `directory` for the base `spec`; raises AdapterRefused.

    Symbolic links are followed first and must end below `root` (the directory itself, if none is given).
    Each file is read once and hashed, and what was hashed is what is used. `base_fingerprint` is compared
    with the one an adapterd.json holds, if both are there. `hashes` are those that somebody declared; if they
    are more than the weights', no other file may be there.
    """
    files = _Files(directory, root=root, adapter=name, hashes=hashes)
    files.refuse_pickles()
    config_bytes = files.read(CONFIG_FILE)
    if config_bytes is None:
        raise AdapterRefused(f"adapter {name!r}: {directory} has no {CONFIG_FILE}, so it is no PEFT adapter")
    config = parse_peft_config(config_bytes, adapter=name)
    weights_path = files.path(WEIGHTS_FILE)
    if weights_path is None:
        raise AdapterRefused(f"adapter {name!r}: {directory} has no {WEIGHTS_FILE}")
    tensors, weights_digest = read_tensors(
        weights_path, adapter=name, check=lambda entries: _check_entries(entries, config, spec, name)
    )
    files.check(WEIGHTS_FILE, weights_digest)
    digests = {CONFIG_FILE: hashlib.sha256(config_bytes).hexdigest(), WEIGHTS_FILE: weights_digest}
    base_match = _check_seal(files.read(SEAL_FILE), digests, base_fingerprint, spec, name)
    modules = _pair(tensors, config)
    _check_values(modules, spec, name)
    sidecars = read_sidecars(files.read, spec=spec, tokenizer=tokenizer, adapter=name)
    if not any(matrices.b.any() for matrices in modules):
        _logger.warning("adapter %r has no effect: every B matrix is zero", name)
    return Adapter(
        id=AdapterId(_digest(modules, sidecars), name),
        path=directory,
        modules=modules,
        max_rank=max(matrices.rank for matrices in modules),
        num_bytes=sum(matrices.a.nbytes + matrices.b.nbytes for matrices in modules),
        base_model_name=config.base_model_name,
        chat_template=sidecars.chat_template,
        eos_token_ids=sidecars.eos_token_ids,
        generation_defaults=MappingProxyType(dict(sidecars.generation_defaults)),
        base_match=base_match,
    )


class _Files:
    """The files of one adapter directory, each opened only after its path is known to lie below the root."""

    def __init__(self, directory: Path, *, root: Path | None, adapter: str, hashes: Hashes) -> None:
        self._adapter = adapter
        self._hashes = hashes
        try:
            self._directory = directory.resolve(strict=True)
            self._root = self._directory if root is None else root.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise AdapterRefused(f"adapter {adapter!r}: {directory} cannot be resolved: {error}") from error
        self._require_below_root(self._directory)
        if not self._directory.is_dir():
            raise AdapterRefused(f"adapter {adapter!r}: {directory} is no directory")

    def path(self, name: str) -> Path | None:
        """Where `name` really is; None if there is no such file."""
        file = self._directory / name
        if not os.path.lexists(file):
            return None
        if lists_files(self._hashes) and name not in self._hashes:
            raise AdapterRefused(
                f"adapter {self._adapter!r}: {name} is there, and it is not among the files whose sha256 was declared"
            )
        try:
            resolved = file.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise AdapterRefused(f"adapter {self._adapter!r}: {name} cannot be resolved: {error}") from error
        self._require_below_root(resolved)
        return resolved

    def read(self, name: str) -> bytes | None:
        """All of a text file, None if it is absent; tokenizer files may be larger than the rest."""
        path = self.path(name)
        if path is None:
            return None
        limit = 64 * _MAX_JSON_BYTES if name == "tokenizer.json" else _MAX_JSON_BYTES
        with open_regular(path, adapter=self._adapter) as file:
            data: bytes = file.read(limit + 1)
        if len(data) > limit:
            raise AdapterRefused(f"adapter {self._adapter!r}: {name} has more than the {limit} bytes allowed")
        self.check(name, hashlib.sha256(data).hexdigest() if name in self._hashes else "")
        return data

    def check(self, name: str, digest: str) -> None:
        """Raise AdapterRefused if another digest was declared for the bytes of a file."""
        if self._hashes.get(name, digest) != digest:
            raise AdapterRefused(
                f"adapter {self._adapter!r}: {name} has sha256 {digest}, and {self._hashes[name]} was declared",
                code="sha256_mismatch",
            )

    def refuse_pickles(self) -> None:
        for name, reason in (
            ("adapter_model.bin", "is a pickle, which can run code when it is read"),
            ("adapter_model.safetensors.index.json", "splits the weights over several files"),
        ):
            if os.path.lexists(self._directory / name):
                raise AdapterRefused(
                    f"adapter {self._adapter!r}: {name} {reason}; keep one {WEIGHTS_FILE} alone"
                    " (PEFT's save_pretrained writes it)"
                )

    def _require_below_root(self, path: Path) -> None:
        if not path.is_relative_to(self._root):
            raise AdapterRefused(
                f"adapter {self._adapter!r}: {path.name} is a link that leads out of {self._root}"
            )


def _check_entries(entries: Sequence[TensorEntry], config: PeftConfig, spec: BaseSpec, adapter: str) -> None:
    """Every tensor is A or B of a linear of the base, in the shape its rank says, and none is missing."""
    sides: dict[str, set[str]] = {}
    for entry in entries:
        module, side = _split(entry.name, spec, adapter)
        rank = config.rank(module)
        d_out, d_in = spec.lora_targets[module]
        expected = (rank, d_in) if side == "A" else (d_out, rank)
        if entry.shape != expected:
            raise AdapterRefused(
                f"adapter {adapter!r}: tensor {entry.name!r} has shape {list(entry.shape)}; with rank {rank}"
                f" on this base it must be {list(expected)} (check r, rank_pattern, and that the base is right)"
            )
        if not config.targets(module):
            raise AdapterRefused(
                f"adapter {adapter!r}: tensor {entry.name!r} adapts a module that {CONFIG_FILE}"
                " does not target, so PEFT would not apply it"
            )
        sides.setdefault(module, set()).add(side)
    if not sides:
        raise AdapterRefused(f"adapter {adapter!r}: {WEIGHTS_FILE} adapts no module of the base")
    for module, found in sides.items():
        if len(found) == 1:
            missing = "B" if "A" in found else "A"
            raise AdapterRefused(
                f"adapter {adapter!r}: {_key(module, missing)!r} is missing from {WEIGHTS_FILE}"
            )
    if config.target_modules is None:
        return
    for module in spec.lora_targets:
        # all-linear leaves the output head out, as PEFT does.
        if (
            module not in sides
            and config.targets(module)
            and not (config.target_modules == "all-linear" and "." not in module)
        ):
            raise AdapterRefused(
                f"adapter {adapter!r}: {CONFIG_FILE} targets {module!r}, but {WEIGHTS_FILE}"
                " has no tensors for it"
            )


def _split(name: str, spec: BaseSpec, adapter: str) -> tuple[str, str]:
    """`base_model.model.X.lora_A.weight` -> (X, "A"), X being a linear of the base."""
    for side in ("A", "B"):
        ending = f".lora_{side}.weight"
        if name.startswith(PREFIX) and name.endswith(ending):
            module = name[len(PREFIX) : -len(ending)]
            if module in spec.lora_targets:
                return module, side
            near = difflib.get_close_matches(module, spec.lora_targets, n=1)
            hint = f"; the nearest it has is {near[0]!r}" if near else ""
            raise AdapterRefused(
                f"adapter {adapter!r}: the base {spec.name!r} has no linear {module!r}{hint}"
            )
    if "lora_magnitude_vector" in name:
        reason = "is DoRA's, which is not supported"
    elif "lora_embedding_" in name:
        reason = "adapts an embedding, which is not supported"
    elif name.endswith(".bias"):
        reason = "is a bias, which is not supported"
    elif ".lora_" not in name:
        reason = (
            "is a whole module trained or saved beside the adapter (modules_to_save), which is not supported"
        )
    else:
        reason = f"is not named as PEFT names it: {PREFIX}MODULE.lora_A.weight"
    raise AdapterRefused(f"adapter {adapter!r}: tensor {name!r} {reason}")


def _key(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


def _pair(tensors: Mapping[str, torch.Tensor], config: PeftConfig) -> tuple[LoraMatrices, ...]:
    ending = ".lora_A.weight"
    modules = sorted(name[len(PREFIX) : -len(ending)] for name in tensors if name.endswith(ending))
    return tuple(
        LoraMatrices(module, tensors[_key(module, "A")], tensors[_key(module, "B")], config.scale(module))
        for module in modules
    )


def _check_values(modules: Sequence[LoraMatrices], spec: BaseSpec, adapter: str) -> None:
    """No NaN, no infinity, and no update that the base's compute type cannot hold."""
    largest = torch.finfo(getattr(torch, spec.dtype)).max
    for matrices in modules:
        for side, tensor in (("A", matrices.a), ("B", matrices.b)):
            if not torch.isfinite(tensor).all():
                raise AdapterRefused(
                    f"adapter {adapter!r}: {_key(matrices.module, side)!r} holds NaN or infinity"
                )
        peaks = [float(tensor.abs().max()) for tensor in (matrices.a, matrices.b)]
        if (
            max(*peaks, abs(matrices.scale), peaks[0] * peaks[1] * matrices.rank * abs(matrices.scale))
            > largest
        ):
            raise AdapterRefused(
                f"adapter {adapter!r}: the update of {matrices.module!r} reaches values beyond {spec.dtype}"
            )


def _check_seal(
    data: bytes | None, digests: Mapping[str, str], base_fingerprint: str | None, spec: BaseSpec, adapter: str
) -> BaseMatch:
    """Compare with adapterd.json, which training writes: the base it is for and what its files hash to."""
    if data is None:
        return "shapes"
    seal = parse_json_object(data, file=SEAL_FILE, adapter=adapter)
    files = seal.get("files")
    if not isinstance(files, dict):
        raise AdapterRefused(f"adapter {adapter!r}: {SEAL_FILE} has no 'files' with the sha256 of each")
    for name, digest in digests.items():
        if files.get(name) != digest:
            raise AdapterRefused(
                f"adapter {adapter!r}: {name} has sha256 {digest}, and {SEAL_FILE} says {files.get(name)};"
                f" the files are damaged or of two versions. If the change was meant, remove {SEAL_FILE}"
            )
    recorded = seal.get("base_fingerprint")
    if recorded is not None and base_fingerprint is not None and recorded != base_fingerprint:
        raise AdapterRefused(
            f"adapter {adapter!r} was trained on base {seal.get('base_name')!r} with fingerprint {recorded},"
            f" and {spec.name!r} has {base_fingerprint}. Train it again on this base, or serve that one"
        )
    return "shapes" if recorded is None or base_fingerprint is None else "fingerprint"


def _digest(modules: Sequence[LoraMatrices], sidecars: Sidecars) -> AdapterDigest:
    """sha256 over all that changes an answer, the same wherever and however the files lie."""
    digest = hashlib.sha256()
    for matrices in modules:
        for tensor in (matrices.a, matrices.b):
            described = [matrices.module, matrices.scale, str(tensor.dtype), list(tensor.shape)]
            digest.update(json.dumps(described).encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    eos = None if sidecars.eos_token_ids is None else sorted(sidecars.eos_token_ids)
    digest.update(
        json.dumps([sidecars.chat_template, eos, sorted(sidecars.generation_defaults.items())]).encode()
    )
    return AdapterDigest(digest.hexdigest())
