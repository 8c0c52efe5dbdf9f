from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditr_cache.errors import DataError, FormatVersionError, MissingDataError, StorageError
from ditr_train.checkpoint import load_checkpoint, save_checkpoint


def state(value: float = 1.0) -> dict[str, object]:
    return {"model": {"w": torch.full((3,), value)}, "step": 4, "best": None, "last": {"mIoU": 0.5, "IoU": {"a": None}}}


def test_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", state(1.0))
    save_checkpoint(tmp_path / "last.pt", state(2.0))
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded["model"]["w"].tolist() == [2, 2, 2] and loaded["step"] == 4 and loaded["last"] == state()["last"]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "last.pt", state(1.0))

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="free space"):
        save_checkpoint(tmp_path / "last.pt", state(2.0))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write checkpoint"):
        save_checkpoint(tmp_path / "none" / "last.pt", state())


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(MissingDataError, match="does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, state())
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cut or damaged"):
            load_checkpoint(path)
    torch.save({"format_version": 99, "model": {}}, path)
    with pytest.raises(FormatVersionError, match="version 99"):
        load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(path)


def test_no_code_is_executed_by_reading(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "model": Path("x")}, tmp_path / "last.pt")  # an object that weights_only refuses
    with pytest.raises(DataError, match="cut or damaged"):
        load_checkpoint(tmp_path / "last.pt")
