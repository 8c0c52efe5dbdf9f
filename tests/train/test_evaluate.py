from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditr_cache.errors import DataError, DeviceError, MismatchError, MissingDataError, UnknownNameError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import open_cache
from ditr_train.checkpoint import load_checkpoint, save_checkpoint
from ditr_train.evaluate import evaluate, predict_sample
from ditr_train.probe import ProbeConfig, probe
from ditr_train.probe_tables import probe_tables
from ditr_train.recipe import Recipe, parse_recipe
from ditr_train.report import percent
from ditr_train.trained import load_run
from ditr_train.trainer import train


def recipe(cache: Path) -> Recipe:
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1], "norm_momentum": 0.1}
    return parse_recipe(
        {
            "cache": str(cache),
            "vfm": "fake",
            "data": {"grid_size": 0.1, "feat": ["color", "normal"], "batch_size": 2, "workers": 0},
            "model": {"backbone": backbone, "injection": {}},
            "optimizer": {"lr": 0.02},
            "training": {"epochs": 3},
        }
    )


@pytest.fixture(scope="module")
def run(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe(tiny_cache), folder, device="cpu", quiet=True)
    return folder


def test_score_is_that_of_the_predictions_of_all_points(run: Path, tiny_cache: Path) -> None:
    results = evaluate(run, device="cpu")
    cache, trained = open_cache(tiny_cache), load_run(run, device="cpu")
    hits, unions, right, labelled = np.zeros(3), np.zeros(3), 0, 0
    for name in cache.split_ids("val"):
        sample = cache.read(name)
        predicted = predict_sample(trained, name)[sample.source_index]  # to the cache's order
        assert sample.segment is not None and predicted.min() >= 0
        valid = sample.segment >= 0
        right, labelled = right + (predicted == sample.segment)[valid].sum(), labelled + valid.sum()
        for c in range(3):
            a, b = predicted[valid] == c, sample.segment[valid] == c
            hits[c], unions[c] = hits[c] + (a & b).sum(), unions[c] + (a | b).sum()
    assert list(results["IoU"].values()) == pytest.approx(hits / unions)
    assert results["mIoU"] == pytest.approx((hits / unions).mean())
    assert results["allAcc"] == pytest.approx(right / labelled)
    assert results["samples"] == 2 and results["split"] == "val"
    json.dumps(results, allow_nan=False)


def test_groups_of_classes_are_scored_where_the_cache_has_them(run: Path, tiny_cache: Path, tmp_path: Path) -> None:
    plain = evaluate(run, device="cpu")
    assert "groups" not in plain
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    metadata = open_cache(cache).metadata
    (cache / "cache.json").write_text(replace(metadata, class_groups=("head", "head", "tail")).to_json())
    copy = shutil.copytree(run, tmp_path / "run")
    for protocol in ("fast", "full"):
        results = evaluate(copy, device="cpu", cache=str(cache), protocol=protocol)
        iou = results["IoU"]
        assert results["groups"] == pytest.approx({"head": (iou["floor"] + iou["wall"]) / 2, "tail": iou["picture"]})
        assert json.loads((copy / "eval" / f"val-best-{protocol}.json").read_text())["groups"] == results["groups"]
    found = probe(str(cache), config=ProbeConfig(inputs=("feature",), iterations=5))
    column = probe_tables(found)[0].columns.index("mIoU tail (all points)")
    assert [row[column] for row in probe_tables(found)[0].rows] == [
        percent(scores["all"]["IoU"]["picture"]) for scores in found["probes"]
    ]


def test_last_checkpoint_scores_as_the_training_said(run: Path) -> None:
    said = load_checkpoint(run / "last.pt")["last"]
    for workers in (0, 1):
        assert evaluate(run, device="cpu", checkpoint="last", workers=workers)["IoU"] == said["IoU"]


def test_a_relative_cache_is_found_from_another_folder(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_cache.parent)
    train(recipe(Path(tiny_cache.name)), tmp_path / "run", device="cpu", quiet=True)
    monkeypatch.chdir(tmp_path)
    assert evaluate("run", device="cpu")["cache"] == str(tiny_cache.resolve())


def test_points_come_back_in_the_datasets_order(run: Path, tiny_cache: Path) -> None:
    trained = load_run(run, device="cpu")
    prediction = predict_sample(trained, "room04")
    source = open_cache(tiny_cache).read("room04").source_index
    assert prediction.dtype == np.int64 and len(prediction) == len(source)
    # Neighbours of one voxel share a prediction; a wrong order would not know of it.
    sample = trained.dataset("val").eval_sample(0)
    assert sample.inverse is not None
    in_cache_order = prediction[source]
    for voxel in range(0, len(sample.coord), 17):
        assert len(set(in_cache_order[sample.inverse == voxel])) == 1


def test_prediction_needs_no_labels(run: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    cache = make_cache(tmp_path / "c", points=200, without=("segment",))
    trained = load_run(run, device="cpu", cache=str(cache))
    assert len(predict_sample(trained, "room00")) == 200
    with pytest.raises(MissingDataError, match="no 'segment'"):
        evaluate(run, device="cpu", cache=str(cache))


def test_features_of_another_model_are_refused(
    run: Path, tmp_path: Path, make_cache: Callable[..., Path], make_spec: Callable[..., VFMSpec]
) -> None:
    for part, value in (("weights_sha256", "1" * 64), ("mean", (0.1,)), ("tap", "early"), ("fuse", "last")):
        cache = make_cache(tmp_path / part, points=20, specs=(make_spec(**{part: value}),))
        with pytest.raises(MismatchError, match=f"{part} differs"):
            evaluate(run, device="cpu", cache=str(cache))
    cache = make_cache(tmp_path / "classes", points=20, classes=("floor", "wall", "poster"))
    with pytest.raises(MismatchError, match=r"'picture'.*'poster'"):
        evaluate(run, device="cpu", cache=str(cache))


def test_wrong_use(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="not a run folder"):
        evaluate(tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'val'"):
        evaluate(run, "vall", device="cpu")
    with pytest.raises(UnknownNameError, match="did you mean 'room05'"):
        predict_sample(load_run(run, device="cpu"), "room5")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="--device cpu"):
            evaluate(run, device="cuda")


def test_damaged_run_folders(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "run.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    with pytest.raises(MissingDataError, match=r"no best\.pt yet"):
        load_run(copy, device="cpu")
    state = load_checkpoint(run / "best.pt")
    state["model"].pop("head.weight")
    save_checkpoint(copy / "best.pt", state)
    with pytest.raises(DataError, match="does not fit the network"):
        load_run(copy, device="cpu")
    (copy / "run.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load_run(copy, device="cpu")


def test_scores_on_another_cache_take_no_others_place(
    run: Path, tiny_cache: Path, tmp_path: Path, make_cache: Callable[..., Path]
) -> None:
    moved = shutil.copytree(tiny_cache, tmp_path / "moved")
    foreign = make_cache(tmp_path / "foreign", points=300, seed=3)
    own = evaluate(run, device="cpu")
    assert own["other_cache"] is None
    assert evaluate(run, device="cpu", cache=str(moved))["other_cache"] is None
    other = evaluate(run, device="cpu", cache=str(foreign))
    assert len(other["other_cache"]) == 8
    kept = {path.name: json.loads(path.read_text()) for path in (run / "eval").glob("*.json")}
    assert kept["val-best-fast.json"]["mIoU"] == own["mIoU"]
    assert kept[f"val-best-fast-cache-{other['other_cache']}.json"]["mIoU"] == other["mIoU"]
