"""Files of tensors: what is damaged, and what fits its digest and is still wrong."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from droidspeak_ops import tensor_file

VALUES, TENSORS = {"count": 2, "names": ["a", "b"]}, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}


def read(path: Path, *taken: str) -> dict[str, torch.Tensor]:
    def make(values: dict[str, Any], tensors: tensor_file.Tensors) -> dict[str, torch.Tensor]:
        assert values == VALUES
        return {name: tensors.take(name) for name in taken}

    return tensor_file.read(path, "things", dict[str, Any], make)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensor_file.write(tmp_path / "file", "things", VALUES, TENSORS)
    return tmp_path / "file"


def test_what_is_written_comes_back(path: Path) -> None:
    found = read(path, "a", "b")
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert tensor_file.digest(VALUES, TENSORS) == tensor_file.digest(VALUES, found)


def test_every_tensor_is_taken_and_there(path: Path) -> None:
    with pytest.raises(ValueError, match=f"{path}: tensors: expected no others, got ..b.."):
        read(path, "a")
    with pytest.raises(ValueError, match=f"{path}: tensors: expected one named 'c', got none"):
        read(path, "a", "b", "c")


def test_nan_is_not_written_among_plain_values(path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        tensor_file.write(path, "things", {"count": float("nan")}, TENSORS)
    read(path, "a", "b")


def test_plain_values_that_are_not_json_are_named(path: Path) -> None:
    path.write_bytes(tensor_file.sealed("things", '{"count": NaN}', TENSORS))
    with pytest.raises(ValueError, match=f"{path}: expected JSON of finite numbers"):
        read(path, "a", "b")


def _with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _tensor(dtype: str, shape: list[int], end: int) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        struct.pack("<Q", 2**63) + b"{}",
        _with_header(_tensor("F32", [2**40], 2**42), b"1234"),  # of terabytes
        _with_header(_tensor("F32", [2**62, 2**62], 4), b"1234"),
        _with_header(_tensor("F32", [0, 2**63], 0)),
        _with_header(_tensor("F32", [-1], 4), b"1234"),
        _with_header(_tensor("F4", [8], 4), b"1234"),  # which torch does not have
        _with_header(_tensor("X32", [1], 4), b"1234"),
        _with_header(b"[" * 100_000),
        _with_header(b'{"__metadata__": {"x": 1}}'),
        _with_header(b'{"__metadata__": {"x": "1", "x": "2"}}'),
        _with_header(b"\xff\xff"),
    ],
)
def test_a_file_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file: expected a file of droidspeak things, got none of safetensors"):
        read(tmp_path / "file")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match=str(path)):
            read(path)
