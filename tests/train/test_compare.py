from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ditr_cache.errors import DataError, MissingDataError, StorageError, UsageError
from ditr_train.cli import main
from ditr_train.compare import BEST, LAST, compare, evaluation_label
from ditr_train.compare_plot import check_output, curves, write_comparison
from ditr_train.compare_tables import as_csv, tables
from ditr_train.recipe import parse_recipe
from ditr_train.run_folder import CacheInfo, RunFolder, RunInfo
from ditr_train.text_table import as_markdown

RECIPE: dict[str, Any] = {
    "cache": "c", "vfm": "fake", "data": {"grid_size": 0.1, "feat": ["color"], "batch_size": 2},
    "model": {"injection": {}}, "training": {"epochs": 2},
}  # fmt: skip


def make_run(
    path: Path,
    miou: Sequence[float] = (0.2, 0.5, 0.4),
    *,
    classes: tuple[str, ...] = ("wall", "sink"),
    metric: str = "mIoU",
    groups: Sequence[dict[str, float | None]] = (),
    train: dict[str, Any] | None = None,
    identity: str = "i",
    **changes: Any,
) -> Path:
    """A run folder with an evaluation per value, at steps 10, 20, ...; the last ends the last epoch."""
    recipe = parse_recipe({**RECIPE, "training": {"epochs": max(1, len(miou))}, **changes})
    vfm = recipe.vfm and f"{recipe.vfm}-12345678"
    info = RunInfo(
        caches=(CacheInfo(path="/data/c", dataset="rooms", vfm_key=vfm, samples=4, identity=identity),),
        class_names=classes, class_colors=((0, 0, 0),) * len(classes), in_channels=3, vfm=None, init=None, versions={},
        device="cpu", command="ditr-train run", git_commit=None,
    )  # fmt: skip
    RunFolder(path).create(recipe, info)
    lines: list[dict[str, Any]] = []
    more = {"data_wait": 0.1, **(train or {})}
    for epoch, value in enumerate(miou, 1):
        step = 10 * epoch
        lines.append({"kind": "train", "step": step, "epoch": epoch, "loss": 1 / step, **more})
        scores = {"cosine": value} if metric == "cosine" else {
            "mIoU": value, "mAcc": 0.6, "allAcc": 0.7, "IoU": {c: value / (i + 1) for i, c in enumerate(classes)}
        }  # fmt: skip
        if groups:
            scores["groups"] = groups[epoch - 1]
        lines.append({"kind": "val", "step": step, "epoch": epoch, "protocol": "fast", **scores})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def add_evaluation(run: Path, miou: float, *, protocol: str = "full", tta: str | None = None) -> None:
    results = {
        "run": str(run), "split": "val", "checkpoint": "best", "protocol": protocol, "tta": tta, "step": 20,
        "mIoU": miou, "mAcc": 0.6, "allAcc": 0.7, "IoU": {"wall": miou, "sink": None}, "Acc": {},
    }  # fmt: skip
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"val-best-{protocol}-{tta}.json").write_text(json.dumps(results))


def test_evaluations_are_told_apart() -> None:
    full = {"split": "val", "checkpoint": "best", "protocol": "full"}
    kinds: list[dict[str, Any]] = [
        {"tta": "none"}, {"tta": "scannet"}, {"tta": [{"flip": True}]}, {"tta": [{"flip": False}]},
        {"pre_grid_size": 0.02}, {"split": "test"}, {"checkpoint": "last"}, {"protocol": "fast"},
    ]  # fmt: skip
    labels = [evaluation_label({**full, **kind}) for kind in kinds]
    assert len(set(labels)) == len(kinds) and labels[:2] == ["full val, best", "full val, best, TTA scannet"]


def table(comparison: Any, start: str) -> dict[str, dict[str, str]]:
    """Row name -> column -> cell of the table whose title starts so."""
    found = next(t for t in tables(comparison) if t.title.startswith(start))
    return {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_protocols_are_never_in_one_column(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", [0.3, 0.6], vfm=None, model={})
    add_evaluation(a, 0.55)
    add_evaluation(a, 0.57, tta="scannet")
    add_evaluation(b, 0.61, protocol="fast")
    comparison = compare([a, b])
    assert comparison.labels == [LAST, BEST, "fast val, best", "full val, best", "full val, best, TTA scannet"]
    rows = table(comparison, "Results")
    assert rows["a"]["mIoU (fast, last)"] == "40.00" and rows["a"]["mIoU (fast, best)"] == "50.00"
    assert rows["a"]["mIoU (full val, best)"] == "55.00" and rows["b"]["mIoU (full val, best)"] == "-"
    assert rows["a"]["mIoU (full val, best, TTA scannet)"] == "57.00" and rows["a"]["mIoU (fast val, best)"] == "-"
    assert rows["b"]["mIoU (fast val, best)"] == "61.00" and rows["b"]["mIoU (fast, last)"] == "60.00"
    assert (rows["a"]["recipe"], rows["b"]["recipe"], rows["b"]["VFM"]) == ("inject", "plain", "-")
    per_class = [t.title for t in tables(comparison) if t.title.startswith("IoU per class")]
    assert per_class == [f"IoU per class in percent, {label}" for label in comparison.labels[1:]]


def test_groups_of_classes_are_columns_beside_all(tmp_path: Path) -> None:
    for seed, head in enumerate((0.4, 0.6)):
        make_run(tmp_path / f"x-{seed}", [0.3], seed=seed, groups=[{"head": head, "tail": None}])
    make_run(tmp_path / "none", [0.2], seed=2, identity="j")
    comparison = compare([tmp_path])
    rows = table(comparison, "Results")
    assert rows["x-0"]["mIoU head (fast, last)"] == "40.00" and rows["none"]["mIoU head (fast, last)"] == "-"
    assert "mIoU tail (fast, last)" not in rows["x-0"]  # in no run does any of its classes occur
    assert table(comparison, "Mean")["x"]["mIoU head (fast, last)"] == "50.00 ± 14.14"
    csv_rows = {row["run"]: row for row in csv.DictReader(as_csv(comparison).splitlines())}
    assert csv_rows[str(tmp_path / "x-1")]["fast, last: mIoU head"] == "0.6"
    assert csv_rows[str(tmp_path / "none")]["fast, last: mIoU head"] == ""


def test_best_run_of_each_class_is_marked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", [0.5]), make_run(tmp_path / "b", [0.6], seed=1), make_run(tmp_path / "c", [0.0])]
    found = next(t for t in tables(compare(runs)) if t.title.startswith("IoU per class"))
    assert found.columns == ("class", "a", "b", "c") and found.best == {(0, 2), (1, 2)}
    assert "| **60.00** |" in as_markdown([found])
    alone = next(t for t in tables(compare(runs[:1])) if t.title.startswith("IoU per class"))
    assert not alone.best


def test_seeds_are_grouped_and_nothing_else(tmp_path: Path) -> None:
    for seed, miou in enumerate((0.4, 0.5, 0.6)):
        make_run(tmp_path / f"x_seed={seed}", [miou], seed=seed, data={**RECIPE["data"], "workers": seed})
    make_run(tmp_path / "other", [0.7], seed=3, optimizer={"lr": 0.1})
    make_run(tmp_path / "other-data", [0.7], seed=4, identity="j")
    unfinished = make_run(tmp_path / "x_seed=5", [0.1], seed=5, training={"epochs": 1})
    (unfinished / "metrics.jsonl").write_text("")
    comparison = compare([tmp_path])
    groups = {group.name: [run.recipe.seed for run in group.runs] for group in comparison.groups}
    assert groups == {"other": [3], "other-data": [4], "x": [0, 1, 2, 5]}
    found = table(comparison, "Mean")["x"]
    assert found["mIoU (fast, last)"] == "50.00 ± 10.00" and found["n"] == "3 (+1 unfinished)"
    assert found["seeds"] == "0, 1, 2" and table(comparison, "Mean")["other"]["mIoU (fast, last)"] == "70.00"
    assert {"data.workers", "optimizer.lr", "seed"} == set(comparison.differing)
    assert table(comparison, "Recipe keys")["optimizer.lr"]["other"] == "0.1"


def test_entries_of_lists_are_compared(tmp_path: Path) -> None:
    for scale in (0.1, 0.5):
        make_run(tmp_path / f"{scale}", [0.5], optimizer={"groups": [{"pattern": "block", "lr_scale": scale}]})
    assert compare([tmp_path]).differing["optimizer.groups.0.lr_scale"] == (0.1, 0.5)


def test_cost_columns_and_older_runs_without_them(tmp_path: Path) -> None:
    new = {"samples_per_second": 2.5, "points_per_second": 20000.0, "memory_bytes": 3 * 2**30, "seconds_per_step": 0.5}
    rows = table(compare([make_run(tmp_path / "new", train=new), make_run(tmp_path / "old")]), "Cost")
    assert (rows["new"]["samples/s"], rows["new"]["points/s"], rows["new"]["peak memory GiB"]) == ("2.5", "20000", "3")
    assert rows["old"]["samples/s"] == rows["old"]["peak memory GiB"] == "-" and rows["old"]["data wait %"] == "10"
    assert rows["old"]["cache"] == "rooms /data/c fake-12345678"


def test_unfinished_and_damaged_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = make_run(tmp_path / "cut", [0.2, 0.3], training={"epochs": 9})
    with (cut / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "train", "step": "x"}\nnull\n{"kind": "train", "step": 30, "loss": NaN}\n{"kind": "val", "st'
        )
    (cut / "eval").mkdir()
    (cut / "eval" / "broken.json").write_text("{")
    empty = make_run(tmp_path / "empty")
    (empty / "metrics.jsonl").unlink()
    comparison = compare([cut, empty])
    rows = table(comparison, "Results")
    assert (rows["cut"]["state"], rows["cut"]["steps"], rows["cut"]["mIoU (fast, last)"]) == (
        "unfinished",
        "30",
        "30.00",
    )
    assert rows["empty"]["state"] == "unfinished, no evaluation yet" and rows["empty"]["mIoU (fast, last)"] == "-"
    assert "broken.json: left out" in caplog.text
    assert curves(compare([empty]), "png").startswith(b"\x89PNG")
    json.dumps(comparison.as_dict())


def test_distillation_shows_cosine_and_other_classes_stand_apart(tmp_path: Path) -> None:
    distill = {"task": "distill", "model": {}}
    runs = [
        make_run(tmp_path / "d", [0.8, 0.9], metric="cosine", **distill),
        make_run(tmp_path / "a", [0.5]),
        make_run(tmp_path / "b", [0.6], classes=("wall", "floor", "door")),
    ]
    comparison = compare(runs)
    rows = table(comparison, "Results")
    assert rows["d"]["cosine (fast, last)"] == "0.9000" and rows["d"]["mIoU (fast, last)"] == "-"
    assert rows["a"]["cosine (fast, last)"] == "-" and rows["d"]["recipe"] == "distill"
    columns = [t.columns for t in tables(comparison) if t.title.startswith("IoU per class")]
    assert columns == [("class", "a"), ("class", "b")]
    write_comparison(comparison, tmp_path / "c.png")


def test_a_distillation_without_evaluation_can_be_done(tmp_path: Path) -> None:
    options = {"task": "distill", "model": {}, "splits": {"val": None}}
    run = make_run(tmp_path / "d", [0.8], metric="cosine", **options)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert compare([run]).runs[0].state == "done"


def test_files(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b<&>", [0.3, 0.6], vfm=None, model={})
    add_evaluation(a, 0.55)
    comparison = compare([a, b])
    for ending in ("html", "png", "csv", "md"):
        write_comparison(comparison, tmp_path / f"c.{ending}")
    page = (tmp_path / "c.html").read_text()
    assert "<svg" in page and page.count("<table>") == len(tables(comparison)) and "b&lt;&amp;&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert float(rows[0]["fast, last: mIoU"]) == 0.4 and float(rows[0]["full val, best: IoU wall"]) == 0.55
    assert rows[1]["full val, best: mIoU"] == "" and rows[0]["full val, best: IoU sink"] == ""
    assert "**Results" in (tmp_path / "c.md").read_text()
    first = (tmp_path / "c.html").read_bytes()
    write_comparison(comparison, tmp_path / "c.html")
    assert (tmp_path / "c.html").read_bytes() == first
    with pytest.raises(StorageError):
        write_comparison(comparison, tmp_path / "none" / "c.csv")


def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at least one"):
        compare([])
    with pytest.raises(MissingDataError, match="is not a run folder"):
        compare([tmp_path])
    with pytest.raises(UsageError, match=r"\.html, \.png"):
        check_output("c.pdf")
    run = make_run(tmp_path / "a")
    (run / "run.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        compare([run])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_output("c.md")
    with pytest.raises(UsageError, match=r"ditr\[plot\]"):
        check_output("c.png")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "one" / "x")
    make_run(tmp_path / "two" / "x", seed=1)
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(["compare", *args])
        return int(done.value.code or 0)

    assert call("one/x", "two", "one", "-o", "c.md") == 0
    out = capsys.readouterr().out
    assert "one/x" in out and "two/x" in out and "Mean ± sample standard deviation" in out
    assert call("one/x", "two/x", "--json") == 0
    parsed = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in parsed["runs"]] == ["one/x", "two/x"]
    assert parsed["groups"][0]["scores"][LAST]["n"] == 2 and parsed["differing"] == {"seed": {"one/x": 0, "two/x": 1}}
    assert call("none") == 2 and call("one/x", "-o", "c.pdf") == 2
    assert "Traceback" not in capsys.readouterr().err
