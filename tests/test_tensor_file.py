import hashlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterd.errors import AdapterRefused
from adapterd.tensor_file import TensorEntry, read_tensors


def no_check(entries: tuple[TensorEntry, ...]) -> None:
    pass


def read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, adapter="support", check=no_check)[0]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        f"t{i}": torch.randn(3 + i, 5).to(t)
        for i, t in enumerate([torch.float32, torch.float16, torch.bfloat16])
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def raw(path: Path, header: Any, data: bytes, *, header_size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_size is None else header_size) + text + data)
    return path


def tensor(start: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, end],
    }


def test_tensors_equal_the_librarys_and_the_digest_is_the_files(whole: Path) -> None:
    from safetensors.torch import load_file

    tensors, digest = read_tensors(whole, adapter="support", check=no_check)
    expected = load_file(whole)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].dtype == values.dtype
        assert torch.equal(tensors[name], values)
    assert digest == hashlib.sha256(whole.read_bytes()).hexdigest()


def test_odd_header_length_still_gives_aligned_tensors(tmp_path: Path) -> None:
    values = torch.arange(2, dtype=torch.float32)
    header = json.dumps({"a": tensor()}).encode()
    path = raw(tmp_path / "f", header + b" " * (1 - len(header) % 2), values.numpy().tobytes())
    assert torch.equal(read(path)["a"], values)


def test_header_is_checked_before_anything_is_read(whole: Path) -> None:
    def refuse(entries: tuple[TensorEntry, ...]) -> None:
        assert {entry.name: entry.shape for entry in entries} == {"t0": (3, 5), "t1": (4, 5), "t2": (5, 5)}
        raise AdapterRefused("no")

    with pytest.raises(AdapterRefused, match="no"):
        read_tensors(whole, adapter="support", check=refuse)


@pytest.mark.parametrize("part", range(64))
def test_file_cut_off_anywhere_is_refused(part: int, whole: Path) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * part // 64])
    with pytest.raises(AdapterRefused, match=r"adapter_model\.safetensors"):
        read(whole)


def test_bytes_after_the_end_are_refused(whole: Path) -> None:
    with whole.open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterRefused, match="are there"):
        read(whole)


DATA = bytes(8)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"[" * 50_000, "nested too deeply"),
        ({"a": 5}, "lacks dtype"),
        ({"a": {"dtype": "F32"}}, "lacks dtype"),
        ({"a": {**tensor(), "data_offsets": [0]}}, "lacks dtype"),
        ({"a": tensor(dtype="F64")}, "dtype F64"),
        ({"a": tensor(dtype="I64")}, "dtype I64"),
        ({"a": {**tensor(), "dtype": ["F32"]}}, "dtype"),
        ({"a": tensor(shape=(3,))}, "takes 12 bytes, not 8"),
        ({"a": tensor(shape=(0,))}, "shape"),
        ({"a": tensor(shape=(-2,))}, "shape"),
        ({"a": tensor(shape=(2**62, 8))}, "takes"),
        ({"a": tensor(shape="2")}, "shape"),
        ({"a": tensor(shape=(True, 2))}, "shape"),
        ({"a": tensor(-8, 0)}, "shape"),
        ({"a": {**tensor(), "data_offsets": ["0", 8]}}, "lacks dtype|shape"),
        ({"a": tensor(0, 4, (1,)), "b": tensor(0, 8)}, "overlaps"),
        ({"a": tensor(4, 8, (1,))}, "gap"),
        ({"a": tensor(0, 4, (1,))}, "take 4 bytes and 8 are there"),
        ({"a": tensor(0, 80, (20,))}, "take 80 bytes and 8 are there"),
        ({}, "take 0 bytes and 8 are there"),
    ],
    ids=range(23),
)
def test_headers_that_contradict_themselves_are_refused(header: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=message):
        read(raw(tmp_path / "f", header, DATA))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**6])
def test_header_longer_than_the_file_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="cut off"):
        read(raw(tmp_path / "f", {"a": tensor()}, DATA, header_size=size))


def test_header_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", 17 << 20))
    os.truncate(path, 18 << 20)
    with pytest.raises(AdapterRefused, match="are allowed"):
        read(path)


def test_no_mutation_of_the_bytes_raises_anything_but_a_refusal(whole: Path) -> None:
    data = whole.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(250)] = rng.randrange(256)
        whole.write_bytes(mutated)
        try:
            read(whole)
        except AdapterRefused:
            refused += 1
    assert refused > 300
