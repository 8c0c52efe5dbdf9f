from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.store import open_cache
from ditr_train import probe as probe_module
from ditr_train.cli import main
from ditr_train.metrics import ConfusionMatrix
from ditr_train.probe import MAJORITY, ProbeConfig, probe


def by_input(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {found["input"]: found for found in results["probes"]}


def test_features_tell_what_points_cannot(tiny_cache: Path) -> None:
    """Only channel 0 of the features tells a picture from the wall; floor and wall differ by normal and height."""
    results = probe(str(tiny_cache), config=ProbeConfig(inputs=("height+normal", "feature", "feature+height+normal")))
    found = by_input(results)
    assert found["height+normal"]["seen"]["IoU"]["picture"] == 0 < 0.6 < found["feature"]["seen"]["IoU"]["picture"]
    assert found["height+normal"]["seen"]["IoU"]["floor"] > 0.99 > found["feature"]["seen"]["IoU"]["floor"]
    assert found["feature+height+normal"]["seen"]["mIoU"] > 0.9
    assert results["missing"] == [] and results["vfm"].startswith("fake-") and results["train_samples"] == 4
    assert results["probes"][0]["input"] == MAJORITY and found["feature"]["dim"] == 8


def test_points_without_a_feature_are_given_the_most_frequent_class(tiny_cache: Path) -> None:
    reader = open_cache(tiny_cache)
    results = probe(reader, "fake", ProbeConfig(inputs=("feature",)))
    valid, labels = (
        np.concatenate([getattr(reader.read(i), name) for i in reader.split_ids("val")])
        for name in ("valid", "segment")
    )
    valid, labels = valid[labels >= 0], labels[labels >= 0]
    assert results["val_points"] == len(labels) and results["coverage"] == pytest.approx(valid.mean())
    majority = reader.metadata.class_names.index(results["majority"])
    found = by_input(results)
    expected = ConfusionMatrix(3)
    expected.update(np.full_like(labels, majority), labels)
    names = reader.metadata.class_names
    assert found[MAJORITY]["all"] == expected.results(names)
    hits = found["feature"]["seen"]["allAcc"] * valid.sum() + (labels[~valid] == majority).sum()
    assert found["feature"]["all"]["allAcc"] == pytest.approx(hits / len(labels))


def test_the_layout_of_the_cache_does_not_matter(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    make_cache(tmp_path / "v", train=2, val=1, layout="views")
    results = probe(str(tmp_path / "v"))
    assert by_input(results)["feature"]["seen"]["IoU"]["picture"] > 0.6


def test_it_is_deterministic_and_bounded(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProbeConfig(points_per_sample=100, iterations=20)
    first, second = (probe(str(tiny_cache), config=config) for _ in range(2))
    scores = [[(p["loss"], p["seen"], p["all"]) for p in results["probes"]] for results in (first, second)]
    assert scores[0] == scores[1] and first["train_points"] == 400
    other = probe(str(tiny_cache), config=ProbeConfig(points_per_sample=100, iterations=20, seed=1))
    assert by_input(other)["feature"]["loss"] != by_input(first)["feature"]["loss"]
    assert [p["input"] for p in first["probes"]] == [MAJORITY, "height+color+normal", "feature"]
    few = probe(str(tiny_cache), config=ProbeConfig(points_per_sample=100, train_samples=3, iterations=5))
    assert few["train_points"] == 300 and few["train_samples"] == 3
    monkeypatch.setattr(probe_module, "POOL_BYTES", 4 * 15 * 100)  # 8 + 3 + 1 + 3 columns, 100 points
    assert probe(str(tiny_cache), config=config)["train_points"] == 100


def test_standardising_is_folded_into_the_weights(tiny_cache: Path) -> None:
    """A brute-force check of the fit: the raw weights give the loss that was reported."""
    reader = open_cache(tiny_cache)
    spec = reader.resolve_vfm()
    config = ProbeConfig(l2=0.0, iterations=30)
    train = probe_module.CachedDataset(reader, "train", grid_size=1.0, feat=["coord"], vfm=spec.key)
    pool = probe_module._draw(reader, train, spec, ["feature"], config)
    linear = probe_module._fit(pool, probe_module.torch.arange(8), 3, config)
    logits = (pool.x * pool.std + pool.mean) @ linear.weight + linear.bias
    assert float(probe_module.F.cross_entropy(logits, pool.y)) == pytest.approx(linear.loss, rel=1e-3)
    assert pool.x.mean(0).abs().max() < 1e-5 and float((pool.x.std(0, correction=0) - 1).abs().max()) < 1e-4


def test_a_class_without_a_training_point_is_named(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", train=1, val=1)
    reader = open_cache(cache)

    class WithoutPictures(type(reader)):  # type: ignore[misc]
        def read(self, sample_id: str, vfm: str | None = None) -> Any:
            sample = super().read(sample_id, vfm)
            if sample.split == "train":
                sample.segment[sample.segment == 2] = 1
            return sample

    results = probe(WithoutPictures(cache))
    assert results["missing"] == ["picture"] and by_input(results)["feature"]["seen"]["IoU"]["picture"] == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"vfm": "fakw"}, UnknownNameError, "did you mean 'fake'"),
        ({"val_split": "test"}, UnknownNameError, "unknown split"),
        ({"inputs": ("feature+colour",)}, UnknownNameError, "did you mean 'color'"),
        ({"inputs": ("color", "color")}, UsageError, "twice"),
        ({"inputs": ("strength",)}, MissingDataError, "'strength'"),
        ({"points_per_sample": 0}, UsageError, "at least 1"),
        ({"l2": -1.0}, UsageError, "l2"),
    ],
)
def test_wrong_use(tiny_cache: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    vfm = settings.pop("vfm", None)
    with pytest.raises(error, match=message):
        probe(str(tiny_cache), vfm, ProbeConfig(**settings))


def test_caches_that_cannot_be_probed(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    make_cache(tmp_path / "unlabelled", train=1, val=1, without=("segment",))
    with pytest.raises(MissingDataError, match="'segment'"):
        probe(str(tmp_path / "unlabelled"))
    make_cache(tmp_path / "partly", train=2, val=1, featureless=("room01",))
    with pytest.raises(MissingDataError, match="room01"):
        probe(str(tmp_path / "partly"))
    make_cache(tmp_path / "bare", train=1, val=1, specs=())
    with pytest.raises(UsageError, match="no features yet"):
        probe(str(tmp_path / "bare"))
    make_cache(tmp_path / "few", train=1, val=1)
    with pytest.raises(DataError, match="a probe needs two"):
        probe(str(tmp_path / "few"), config=ProbeConfig(points_per_sample=1))


def test_command(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*args: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(["probe", *args])
        return int(done.value.code or 0)

    assert call(str(tiny_cache), "--points-per-sample", "200", "--iterations", "10") == 0
    out = capsys.readouterr().out
    assert "height+color+normal" in out and "picture" in out and "% with a feature" in out
    assert call(str(tiny_cache), "--input", "color", "--json") == 0
    assert [p["input"] for p in json.loads(capsys.readouterr().out)["probes"]] == [MAJORITY, "color"]
    assert call("/no/where") == 2 and "Traceback" not in capsys.readouterr().err
