"""The files of a PEFT directory, opened only after each path is known to lie below its root, and the seal over them."""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from adapterd.core import BaseMatch, BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import SEAL_FILE, WEIGHTS_FILE
from adapterd.peft_config import parse_json_object
from adapterd.sources.source import NO_HASHES, Hashes, lists_files
from adapterd.tensor_file import open_regular

_MAX_JSON_BYTES = 1 << 20


class AdapterFiles:
    """Symbolic links are followed first and must end below `root`, or the directory itself if none is given."""

    def __init__(
        self, directory: Path, *, root: Path | None, adapter: str, hashes: Hashes = NO_HASHES
    ) -> None:
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
        try:
            is_link = stat.S_ISLNK(os.lstat(file).st_mode)
        except OSError:
            return None
        if lists_files(self._hashes) and name not in self._hashes:
            raise AdapterRefused(
                f"adapter {self._adapter!r}: {name} is there, and it is not among the files whose sha256 was declared"
            )
        if not is_link:
            return file
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


def check_seal(
    data: bytes | None, digests: Mapping[str, str], base_fingerprint: str | None, spec: BaseSpec, adapter: str
) -> BaseMatch:
    """Compare with adapterd.json, which training writes: the base it is for, its bits, and what its files hash to."""
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
    trained_on = seal.get("trained_on")
    if str(trained_on).startswith("bnb-") and trained_on != spec.quantization:
        raise AdapterRefused(
            f"adapter {adapter!r} was trained on a base held in {trained_on}, and {spec.name!r} is held with"
            f" --quantization {spec.quantization}, on which it answers differently. Serve with --quantization"
            f" {trained_on}, or remove 'trained_on' from {SEAL_FILE} if that is what you want"
        )
    recorded = seal.get("base_fingerprint")
    if recorded is not None and base_fingerprint is not None and recorded != base_fingerprint:
        raise AdapterRefused(
            f"adapter {adapter!r} was trained on base {seal.get('base_name')!r} with fingerprint {recorded},"
            f" and {spec.name!r} has {base_fingerprint}. Train it again on this base, or serve that one"
        )
    return "shapes" if recorded is None or base_fingerprint is None else "fingerprint"
