from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ditr_cache.errors import StorageError
from ditr_train.report import class_table, summary
from ditr_train.tracking import MetricsLog, Tracker, TrainProgress, flat, read_metrics

RESULTS = {
    "mIoU": 0.5,
    "mAcc": None,
    "allAcc": 0.75,
    "IoU": {"wall": 0.5, "sink": None},
    "split": "val",
    "run": "r",
}


def test_metrics_resume_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 7):
        log.write("train", step=step, loss=1 / step)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # cut by a kill
    log = MetricsLog(path, step=4)
    log.write("train", step=5, loss=0.0)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_unwritable_metrics(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--resume"):
        MetricsLog(tmp_path / "none" / "metrics.jsonl")


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path)
    tracker.write("val", **{**RESULTS, "step": 3})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"val/mIoU", "val/allAcc", "val/IoU/wall"}
    assert flat({"a": {"b": 1}, "c": True, "d": None}) == {"a/b": 1.0}


def lines(progress: TrainProgress, output: io.StringIO) -> str:
    with progress:
        for step in range(1, 4):
            progress.step(step, epoch=1, loss=0.5, data_wait=0.031)
        progress.evaluated({**RESULTS, "epoch": 1})
        progress.step(4, epoch=2, loss=0.25, data_wait=0.02)
    return output.getvalue()


def test_progress_without_a_terminal_is_plain_lines() -> None:
    output = io.StringIO()
    text = lines(TrainProgress(4, console=Console(file=output, width=40), every=1000), output)
    assert text.splitlines() == [
        "epoch 1  mIoU 50.00  mAcc -  allAcc 75.00",
        "step 4/4  epoch 2  loss 0.250  mIoU 50.00  data wait 2.0 %",
    ]


def test_progress_on_a_terminal_is_a_bar() -> None:
    output = io.StringIO()
    text = lines(TrainProgress(4, console=Console(file=output, force_terminal=True, width=160)), output)
    assert "4/4" in text and "loss 0.250" in text and "mIoU 50.00" in text and "data wait 2.0 %" in text


def test_progress_can_be_silent() -> None:
    output = io.StringIO()
    assert lines(TrainProgress(4, console=Console(file=output), enabled=False), output) == ""


def test_groups_of_classes_stand_beside_all() -> None:
    grouped = {**RESULTS, "groups": {"head": 0.5, "tail": None}}
    assert summary(grouped) == "mIoU 50.00 (head 50.00, tail -)  mAcc -  allAcc 75.00"
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(class_table(grouped))
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in console.export_text().splitlines()]
    assert ["head", "50.00"] in cells and ["tail", "-"] in cells and ["mIoU", "50.00"] in cells
    assert flat({"groups": grouped["groups"]}, "val/") == {"val/groups/head": 0.5}


def test_class_table() -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(class_table(RESULTS))
    text = console.export_text()
    assert "wall" in text and "50.00" in text
