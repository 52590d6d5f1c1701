"""Writing a PEFT directory that `PeftModel.from_pretrained` and `read_adapter` both load.

Nothing half-written is ever served: a new directory appears by one rename, and in an existing one
adapterd.json, which holds the hashes of the other files, is replaced last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from adapterd.peft_targets import PREFIX
from adapterd.published import sync_directory


def write_adapter(
    directory: Path,
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    r: int,
    lora_alpha: float,
    target_modules: Sequence[str],
    base_name: str,
    base_fingerprint: str | None,
    dtype: torch.dtype = torch.float32,
    magnitudes: Mapping[str, torch.Tensor] | None = None,
    revision: str | None = None,
    notes: Mapping[str, object] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write (a, b) of each module path. a: [r, d_in]; b: [d_out, r]; stored as `dtype`.

    `magnitudes` [d_out] of each module make it a DoRA adapter. `revision` is the base's commit on the Hub.
    `notes` go into adapterd.json beside the hashes, `extra_files` (name -> text) into the directory. Files
    of an existing directory that are not named here stay as they are. Raises ValueError for values that
    are not finite in `dtype`.
    """
    weights: dict[str, torch.Tensor] = {}
    for module, (a, b) in tensors.items():
        for side, tensor in (("A", a), ("B", b)):
            stored = tensor.detach().to("cpu", dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"{module}.lora_{side} holds values that {dtype} cannot; the adapter was not written"
                )
            weights[f"{PREFIX}{module}.lora_{side}.weight"] = stored
    for module, magnitude in (magnitudes or {}).items():
        stored = magnitude.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise ValueError(f"the magnitude of {module} holds values that {dtype} cannot")
        weights[f"{PREFIX}{module}.lora_magnitude_vector"] = stored
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "target_modules": sorted(target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        **({"use_dora": True} if magnitudes else {}),
        **({"revision": revision} if revision else {}),
    }
    contents = {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_FILE: save(weights, metadata={"format": "pt"}),
        **{name: text.encode() for name, text in (extra_files or {}).items()},
    }
    seal = {
        **(notes or {}),
        "base_name": base_name,
        "base_fingerprint": base_fingerprint,
        "files": {name: hashlib.sha256(contents[name]).hexdigest() for name in (CONFIG_FILE, WEIGHTS_FILE)},
    }
    contents[SEAL_FILE] = (json.dumps(seal, indent=2, sort_keys=True) + "\n").encode()
    if directory.exists():
        replace_files(directory, contents)
    else:
        _create_directory(directory, contents)


def base_fingerprint(directory: Path) -> str:
    """sha256 that tells one base from another: its config, and each weight file's size, header and samples.

    64 KiB at 64 places of every safetensors file are hashed, so that a base of 100 GB takes milliseconds
    and one that was trained further still differs.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_bytes())
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(8 + (1 << 20)))
            for place in range(64):
                file.seek(size * place // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _create_directory(directory: Path, contents: Mapping[str, bytes]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps a watched adapter directory from seeing it before it is whole.
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, data in contents.items():
            _write(temporary / name, data)
        sync_directory(temporary)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def replace_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Give an existing directory these files, each by one rename, in order; others stay as they are."""
    staged = {name: directory / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, data in contents.items():
            _write(staged[name], data)
        for name, temporary in staged.items():  # the seal is the last of them
            temporary.rename(directory / name)
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
