"""safetensors files piece by piece: the library's bytes, any rows of a tensor, and one error for a damaged file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafx.errors import CheckpointError
from lorafx.files import disk, shards
from lorafx.files.shards import DTYPES, Entry, Shard, bytes_of, content, same_bytes, size, write


def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, with names whose order is another than that of the dtypes; a scalar and an empty one."""
    found = {f"z{9 - place}.é": torch.arange(15).view(5, 3).to(dtype) for place, dtype in enumerate(DTYPES.values())}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "A": torch.arange(7).bfloat16()}


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    save_file(tensors(), tmp_path / "one.safetensors", {"format": "pt"})
    return Shard.read(tmp_path / "one.safetensors")


def test_what_is_written_is_what_the_library_writes(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 8)
    told: list[int] = []
    write(tmp_path / "two.safetensors", shard.entries, shard.metadata, shard.chunks, told.append)
    assert (tmp_path / "two.safetensors").read_bytes() == shard.file.read_bytes()
    assert sum(told) == size(shard.entries, shard.metadata) == shard.file.stat().st_size and max(told[1:]) == 8


def test_entries_of_tensors_are_those_in_a_file(tmp_path, shard):
    given = tensors()
    entries = {key: Entry.of(tensor) for key, tensor in given.items()}
    write(tmp_path / "two.safetensors", entries, {"format": "pt"}, lambda key: [bytes_of(given[key])])
    assert (tmp_path / "two.safetensors").read_bytes() == shard.file.read_bytes()
    assert entries["A"].cast(torch.float32) == Entry("F32", (7,), 28)
    pieces = content(given, {"format": "pt"})
    assert b"".join(pieces) == shard.file.read_bytes() and disk.holds(shard.file, pieces)
    given["A"] += 1  # which the pieces have no copy of
    assert b"".join(pieces) != shard.file.read_bytes() and not disk.holds(shard.file, pieces)


def test_rows_are_read_as_they_are_stored(shard):
    for key, tensor in tensors().items():
        assert torch.equal(bits(shard.tensor(key)), bits(tensor)), key
        if tensor.shape == (5, 3):
            assert torch.equal(bits(shard.tensor(key, 1, 4)), bits(tensor[1:4])), key
    assert shard.tensor("scalar").shape == () and shard.tensor("A", 2).tolist() == [2, 3, 4, 5, 6]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_bytes_are_those_of_tensors_that_do_not_lie_in_order():
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3).t()
    assert bytes(bytes_of(tensor)) == tensor.contiguous().numpy().tobytes()


def test_tensors_are_compared_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 8)
    same = torch.arange(12.0).view(4, 3)
    other = same.clone()
    other[3, 2] = 0
    save_file({"a": same, "b": same.clone(), "c": other, "d": same.view(3, 4).clone()}, tmp_path / "s.safetensors")
    shard = Shard.read(tmp_path / "s.safetensors")
    assert [same_bytes(shard, "a", shard, key) for key in "bcd"] == [True, False, False]


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "longer"])
def test_a_damaged_file_is_one_error(shard, damage):
    data = shard.file.read_bytes()
    if damage == "missing":
        shard.file.unlink()
    else:
        changed = {"cut": data[:-1], "header": data[:8] + b"[" + data[9:], "longer": data + b"\0"}[damage]
        shard.file.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read"):
        Shard.read(shard.file)


def test_a_file_that_is_cut_off_while_it_is_read_is_one_error(shard):
    shard.file.write_bytes(shard.file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut off while it was read"):
        for key in load_order(shard):
            shard.tensor(key)
    with pytest.raises(CheckpointError, match="cut off while it was read"):
        for key in load_order(shard):
            list(shard.chunks(key))


def load_order(shard: Shard) -> list[str]:
    return sorted(shard.entries, key=lambda key: shard.entries[key].begin)


def test_a_dtype_that_torch_lacks_is_copied(tmp_path, shard):
    data = shard.file.read_bytes().replace(b'"F8_E5M2"', b'"F8_E8M0"')
    shard.file.write_bytes(data)
    again = Shard.read(shard.file)
    key = next(key for key, entry in again.entries.items() if entry.dtype == "F8_E8M0")
    assert again.entries[key].torch_dtype is None
    write(tmp_path / "two.safetensors", again.entries, again.metadata, again.chunks)
    copy = Shard.read(tmp_path / "two.safetensors")
    assert b"".join(copy.chunks(key)) == b"".join(again.chunks(key)) and len(load_file(shard.file)) == len(copy.entries)
