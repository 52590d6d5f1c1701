"""A safetensors file read whole and checked before it is trusted. No mapping into memory, no pickle.

Format: https://huggingface.co/docs/safetensors: 8 bytes little-endian header length, a JSON header
of names with dtype, shape and the half-open byte range of each tensor, then the bytes without gaps.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterd.errors import AdapterRefused
from adapterd.peft_config import parse_json_object

_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 100_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `start` and `end` are half-open, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensors(
    path: Path, *, adapter: str, check: Callable[[tuple[TensorEntry, ...]], None]
) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of `path` and the sha256 of the file's bytes.

    `check` sees the header's entries before any tensor is read or allocated. Raises AdapterRefused for
    a file that is cut off, too long, or whose header contradicts itself.
    """
    with open_regular(path, adapter=adapter) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_size > size - 8:
            raise _broken(
                path, adapter, f"it is cut off: {size} bytes, and the header alone needs {8 + header_size}"
            )
        if header_size > _MAX_HEADER_BYTES:
            raise _broken(
                path, adapter, f"its header has {header_size} bytes; {_MAX_HEADER_BYTES} are allowed"
            )
        header = file.read(header_size)
        entries = _parse_header(header, data_size=size - 8 - header_size, path=path, adapter=adapter)
        check(entries)
        data = bytearray(size - 8 - header_size)
        if file.readinto(data) != len(data) or file.read(1):
            raise _broken(path, adapter, "it changed while it was read")
    digest = hashlib.sha256(prefix + header)
    digest.update(data)
    sizes = [entry.end - entry.start for entry in entries]
    pieces = torch.frombuffer(data, dtype=torch.uint8).split_with_sizes(sizes) if data else ()
    # Copied, so that each owns its memory: of some files little is kept.
    tensors = {
        entry.name: piece.clone().view(entry.dtype).reshape(entry.shape)
        for entry, piece in zip(entries, pieces, strict=True)
    }
    return tensors, digest.hexdigest()


def open_regular(path: Path, *, adapter: str) -> Any:
    """Open a regular file for reading; a FIFO or device is refused rather than waited on."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise AdapterRefused(
            f"adapter {adapter!r}: {path.name} cannot be opened: {error.strerror}"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRefused(f"adapter {adapter!r}: {path.name} is no regular file")
    return os.fdopen(descriptor, "rb")


def _parse_header(data: bytes, *, data_size: int, path: Path, adapter: str) -> tuple[TensorEntry, ...]:
    header = parse_json_object(data, file=path.name, adapter=adapter)
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise _broken(path, adapter, f"it names {len(header)} tensors; {_MAX_TENSORS} are allowed")
    entries = []
    for name, fields in header.items():
        try:
            dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise _broken(path, adapter, f"tensor {name!r} lacks dtype, shape or data_offsets") from error
        well_formed = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not well_formed or type(start) is not int or type(end) is not int or start < 0:
            raise _broken(path, adapter, f"tensor {name!r} has shape {shape} at bytes {start} to {end}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _broken(path, adapter, f"tensor {name!r} has dtype {dtype}; known are {', '.join(_DTYPES)}")
        num_bytes = _DTYPES[dtype].itemsize
        for n in shape:
            num_bytes *= n
        if end - start != num_bytes:
            raise _broken(
                path, adapter, f"tensor {name!r} of shape {shape} takes {num_bytes} bytes, not {end - start}"
            )
        entries.append(TensorEntry(name, _DTYPES[dtype], tuple(shape), start, end))
    entries.sort(key=lambda entry: entry.start)
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise _broken(path, adapter, f"tensor {entry.name!r} {kind}")
        position = entry.end
    if position != data_size:
        raise _broken(path, adapter, f"its tensors take {position} bytes and {data_size} are there")
    return tuple(entries)


def _broken(path: Path, adapter: str, reason: str) -> AdapterRefused:
    return AdapterRefused(f"adapter {adapter!r}: {path.name} cannot be read: {reason}")
