from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.store import CacheReader, open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.data.voxelize import fragments, voxelize
from ditr_train.evaluate import evaluate, predict_sample
from ditr_train.protocol import FullEvaluator, FullPredictor, FullProtocol, FullSamples
from ditr_train.recipe import Recipe, parse_recipe
from ditr_train.trained import load_run
from ditr_train.trainer import train
from ditr_train.tta import Augmentation

GRID = 0.17
CPU = torch.device("cpu")
TTA = (Augmentation(), Augmentation(rotate=90, scale=0.95), Augmentation(rotate=30), Augmentation(scale=1.1, flip="x"))


def recipe(cache: Path, **changes: object) -> Recipe:
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1], "norm_momentum": 0.1}
    values = {
        "cache": str(cache),
        "vfm": "fake",
        "data": {"grid_size": GRID, "feat": ["coord", "color", "normal"], "batch_size": 2, "workers": 0},
        "model": {"backbone": backbone, "injection": {}},
        "optimizer": {"lr": 0.05},
        "training": {"epochs": 20},
    }
    return parse_recipe({**values, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "c", points=500)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An injection network, trained until its predictions depend on points and features."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(recipe(cache), folder, device="cpu", quiet=True)
    return folder


# --- the reference: loops over points, nothing shared with the code it checks ---------------------------------------


@dataclass
class Points:
    coord: list[list[np.float32]]
    color: list[list[float]]
    normal: list[list[np.float32]]
    feature: list[list[float] | None]
    segment: list[int]


def read_points(cache: CacheReader, name: str, *, features: bool = True) -> Points:
    sample = cache.read(name)
    assert sample.color is not None and sample.normal is not None and sample.feature is not None
    return Points(
        coord=[list(p) for p in sample.coord],
        color=sample.color.tolist(),
        normal=[list(p) for p in sample.normal],
        feature=[
            f.tolist() if there and features else None for f, there in zip(sample.feature, sample.valid, strict=True)
        ],
        segment=[] if sample.segment is None else sample.segment.tolist(),
    )


def middle(coord: Sequence[Sequence[np.float32]], *, floor: bool) -> list[list[np.float32]]:
    low = [min(p[a] for p in coord) for a in range(3)]
    high = [max(p[a] for p in coord) for a in range(3)]
    shift = [(low[0] + high[0]) / np.float32(2), (low[1] + high[1]) / np.float32(2), low[2] if floor else np.float32(0)]
    return [[p[a] - shift[a] for a in range(3)] for p in coord]


def moved(vector: Sequence[np.float32], augmentation: Augmentation, *, scaled: bool) -> list[np.float32]:
    turn = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}
    c, s = turn.get(
        int(augmentation.rotate),
        (math.cos(math.radians(augmentation.rotate)), math.sin(math.radians(augmentation.rotate))),
    )
    x = np.float32(c) * vector[0] - np.float32(s) * vector[1]
    y = np.float32(s) * vector[0] + np.float32(c) * vector[1]
    out = [-x if "x" in augmentation.flip else x, -y if "y" in augmentation.flip else y, vector[2]]
    return [v * np.float32(augmentation.scale) for v in out] if scaled else out


def voxels_of(coord: Sequence[Sequence[np.float32]], size: float) -> dict[tuple[int, ...], list[int]]:
    voxels: dict[tuple[int, ...], list[int]] = {}
    for i, point in enumerate(coord):
        voxels.setdefault(tuple(math.floor(float(v) / size) for v in point), []).append(i)
    return dict(sorted(voxels.items()))


def softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(s - highest) for s in scores]
    return [p / sum(powers) for p in powers]


def forward(
    model: nn.Module, points: Points, coord: list[list[np.float32]], normal: list[list[np.float32]],
    chosen: list[int], cells: list[tuple[int, ...]],
) -> list[list[float]]:  # fmt: skip
    """Scores of the chosen points, each the only one of its voxel, alone in a batch."""
    low = [min(c[a] for c in cells) for a in range(3)]
    placed = middle([coord[i] for i in chosen], floor=False)
    feat = [[*placed[k], *(v / 255 for v in points.color[i]), *normal[i]] for k, i in enumerate(chosen)]
    table, index = [[0.0] * 8], []
    for i in chosen:
        feature = points.feature[i]
        index.append(-1 if feature is None else len(table))
        if feature is not None:
            table.append(feature)
    batch = PointBatch(
        coord=torch.tensor(np.array(placed)),
        grid_coord=torch.tensor([[c[a] - low[a] for a in range(3)] for c in cells], dtype=torch.int32),
        feat=torch.tensor(np.array(feat, dtype=np.float32)),
        offset=torch.tensor([len(chosen)]),
        segment=None,
        features=FeatureRows(table=torch.tensor(table), scale=None, index=torch.tensor(index)),
        names=("reference",),
    )
    model.eval()
    with torch.no_grad():
        return model(batch).tolist()  # type: ignore[no-any-return]


def reference_full(
    model: nn.Module, points: Points, tta: Sequence[Augmentation], centre: bool = True
) -> tuple[list[list[float]], int]:
    """Sums of softmax scores of every point, and the number of fragments."""
    total = [[0.0, 0.0, 0.0] for _ in points.coord]
    count = 0
    begin = middle(points.coord, floor=True) if centre else points.coord
    for augmentation in tta:
        coord = [moved(p, augmentation, scaled=True) for p in begin]
        normal = [moved(p, augmentation, scaled=False) for p in points.normal]
        voxels = voxels_of(coord, GRID)
        for number in range(max(len(members) for members in voxels.values())):
            chosen = [members[number % len(members)] for members in voxels.values()]
            for i, scores in zip(chosen, forward(model, points, coord, normal, chosen, list(voxels)), strict=True):
                for k, p in enumerate(softmax(scores)):
                    total[i][k] += p
            count += 1
    return total, count


def reference_fast(model: nn.Module, points: Points) -> list[int]:
    coord = middle(points.coord, floor=True)
    voxels = voxels_of(coord, GRID)
    chosen = [members[0] for members in voxels.values()]
    prediction = [-1] * len(coord)
    scores = forward(model, points, coord, points.normal, chosen, list(voxels))
    for members, row in zip(voxels.values(), scores, strict=True):
        for i in members:
            prediction[i] = row.index(max(row))
    return prediction


def reference_iou(pairs: Sequence[tuple[int, int]]) -> list[float]:
    iou = []
    for c in range(3):
        both = sum(1 for p, t in pairs if p == c and t == c)
        iou.append(both / sum(1 for p, t in pairs if t >= 0 and c in (p, t)))
    return iou


def without_features(points: Points) -> Points:
    return Points(points.coord, points.color, points.normal, [None] * len(points.coord), points.segment)


# --- both protocols against it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 1000, 1 << 18])
def test_full_scores_are_those_of_the_loops(run: Path, cache: Path, budget: int) -> None:
    trained, reader = load_run(run, device="cpu"), open_cache(cache)
    dataset = trained.dataset("val")
    protocol = FullProtocol(tta=TTA, points_per_pass=budget)
    predictor = FullPredictor(trained.model, dataset, protocol, CPU)
    scores = predictor.scores(FullSamples(dataset)[0]).numpy()
    points = read_points(reader, dataset.ids[0])
    expected, count = reference_full(trained.model, points, TTA)
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert predictor.fragments == count and (scores.sum(axis=1) >= len(TTA) - 1e-3).all()
    assert (predictor.passes == count) if budget == 1 else (predictor.passes < count)
    # The features take part, and each with its own point: without them, or moved by one point, it is another result.
    plain, _ = reference_full(trained.model, without_features(points), TTA[:1])
    alone, _ = reference_full(trained.model, points, TTA[:1])
    points.feature = [*points.feature[1:], points.feature[0]]
    shifted, _ = reference_full(trained.model, points, TTA[:1])
    assert np.abs(np.subtract(plain, alone)).max() > 0.05 and np.abs(np.subtract(shifted, alone)).max() > 0.05


def test_both_protocols_give_the_mean_iou_of_the_loops(run: Path, cache: Path, tmp_path: Path) -> None:
    trained, reader = load_run(run, device="cpu"), open_cache(cache)
    dataset = trained.dataset("val")
    full = FullEvaluator(dataset, FullProtocol(tta=TTA), CPU)(trained.model)
    fast = evaluate(run, device="cpu")
    pairs: dict[str, list[tuple[int, int]]] = {"full": [], "fast": []}
    fragment_count = 0
    for name in dataset.ids:
        points = read_points(reader, name)
        scores, count = reference_full(trained.model, points, TTA)
        fragment_count += count
        pairs["full"] += [(s.index(max(s)), t) for s, t in zip(scores, points.segment, strict=True)]
        pairs["fast"] += list(zip(reference_fast(trained.model, points), points.segment, strict=True))
    for name, results in (("full", full), ("fast", fast)):
        iou = reference_iou(pairs[name])
        # One point of a thousand may stand between two classes by the last bit of a float.
        assert list(results["IoU"].values()) == pytest.approx(iou, abs=2e-3)
        assert results["mIoU"] == pytest.approx(sum(iou) / 3, abs=2e-3) and results["protocol"] == name
    assert full["fragments"] == fragment_count and 0 < full["passes"] <= fragment_count
    assert full["tta"][1] == {"rotate": 90.0, "scale": 0.95, "flip": "none"}
    assert full["mIoU"] != fast["mIoU"] and "tta" not in fast and "fragments" not in fast


def test_full_without_augmentation_is_deterministic_and_keeps_the_mode(run: Path) -> None:
    trained = load_run(run, device="cpu")
    dataset = trained.dataset("val")
    trained.model.train()
    scores = [
        FullPredictor(trained.model, dataset, FullProtocol(points_per_pass=budget), CPU).scores(FullSamples(dataset)[0])
        for budget in (1 << 18, 1 << 18)
    ]
    assert torch.equal(*scores) and trained.model.training
    with_worker = FullEvaluator(dataset, FullProtocol(), CPU, workers=2)(trained.model)
    assert with_worker["IoU"] == FullEvaluator(dataset, FullProtocol(), CPU)(trained.model)["IoU"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_scores(run: Path) -> None:
    on_cpu, on_gpu = load_run(run, device="cpu"), load_run(run, device="cuda")
    dataset, protocol = on_cpu.dataset("val"), FullProtocol(tta=TTA)
    sample = FullSamples(dataset)[0]
    expected = FullPredictor(on_cpu.model, dataset, protocol, CPU).scores(sample)
    scores = FullPredictor(on_gpu.model, dataset, protocol, on_gpu.device).scores(sample.pin_memory())
    torch.testing.assert_close(scores.cpu(), expected, atol=2e-3, rtol=1e-3)
    again = FullPredictor(on_gpu.model, dataset, protocol, on_gpu.device).predict(sample)
    assert (again == scores.argmax(dim=1).cpu().numpy()).all()


def test_features_are_read_once_per_sample(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_run(run, device="cpu")
    dataset = trained.dataset("val")
    reads: list[str] = []
    read_stored = CacheReader.read_stored

    def counted(self: CacheReader, sample_id: str, *args: object, **kwargs: object) -> object:
        reads.append(sample_id)
        return read_stored(self, sample_id, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheReader, "read_stored", counted)
    results = FullEvaluator(dataset, FullProtocol(tta="scannet", points_per_pass=1), CPU)(trained.model)
    assert reads == dataset.ids and results["passes"] == results["fragments"] > 13 * len(reads)


def test_pre_grid_gives_every_point_of_a_cell_one_class(run: Path, cache: Path) -> None:
    trained, reader = load_run(run, device="cpu"), open_cache(cache)
    dataset, size = trained.dataset("val"), 0.4
    protocol = FullProtocol(tta=TTA[:2], pre_grid_size=size)
    predictor = FullPredictor(trained.model, dataset, protocol, CPU)
    sample = FullSamples(dataset, size)[0]
    prediction, scores = predictor.predict(sample), predictor.scores(sample).numpy()
    points = read_points(reader, dataset.ids[0])
    points.coord = middle(points.coord, floor=True)
    cells = voxels_of(points.coord, size)
    first = [members[0] for members in cells.values()]
    kept = Points(*([getattr(points, name)[i] for i in first] for name in ("coord", "color", "normal", "feature")), [])
    np.testing.assert_allclose(scores, reference_full(trained.model, kept, TTA[:2], centre=False)[0], atol=2e-4)
    assert len(prediction) == len(points.coord)
    for members, row in zip(cells.values(), scores, strict=True):
        assert {int(prediction[i]) for i in members} == {int(row.argmax())}
    used = sum(1 for i in first if points.feature[i] is not None)
    assert sample.features is not None and len(sample.features.table) == used  # rows of dropped points stay behind


# --- properties -----------------------------------------------------------------------------------------------------

COORD = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=st.floats(-3, 3, width=32, allow_nan=False)
)


@settings(max_examples=80, deadline=None)
@given(coord=COORD, size=st.sampled_from([0.05, 0.5, 2.0, 10.0]))
def test_fragments_cover_all_points_with_unique_voxels(coord: np.ndarray, size: float) -> None:
    parts, voxels = fragments(coord, size), voxelize(coord, size)
    assert (parts.grid_coord == voxels.grid_coord).all() and (parts.pick(0) == voxels.pick).all()
    assert len({tuple(c) for c in parts.grid_coord.tolist()}) == len(parts.grid_coord)
    members: dict[int, list[int]] = {}
    for point, voxel in enumerate(voxels.inverse.tolist()):
        members.setdefault(voxel, []).append(point)
    seen: set[int] = set()
    for number in range(len(parts)):
        pick = parts.pick(number).tolist()
        assert pick == [members[v][number % len(members[v])] for v in range(len(members))]
        assert voxels.inverse[pick].tolist() == list(range(len(members)))  # one point of each voxel
        seen.update(pick)
    assert seen == set(range(len(coord))) and len(parts) == max(map(len, members.values()))


class OwnFeature(nn.Module):
    """Scores of a point that depend on nothing but its own feature row and colour: tells whose they are."""

    def forward(self, batch: PointBatch) -> torch.Tensor:
        assert batch.features is not None
        scores = torch.zeros(len(batch.feat), 3)
        seen = batch.features.index >= 0
        scores[seen, 0] = batch.features.decode(batch.features.index[seen])[:, 1] / 100
        scores[:, 1] = batch.feat[:, 0]
        scores[~seen, 2] = 5.0
        return scores


@settings(max_examples=15, deadline=None)
@given(
    budget=st.sampled_from([1, 200, 1 << 18]),
    tta=st.lists(
        st.builds(
            Augmentation,
            rotate=st.floats(0, 360),
            scale=st.floats(0.7, 1.3),
            flip=st.sampled_from(["none", "x", "y", "xy"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_a_feature_row_goes_with_its_own_point(numbered: Path, budget: int, tta: list[Augmentation]) -> None:
    dataset = CachedDataset(open_cache(numbered), "val", grid_size=0.3, feat=("color",), vfm="fake")
    predictor = FullPredictor(OwnFeature(), dataset, FullProtocol(tta=tuple(tta), points_per_pass=budget), CPU)
    scores = predictor.scores(FullSamples(dataset)[0])
    sample = open_cache(numbered).read(dataset.ids[0])
    assert sample.feature is not None and sample.color is not None
    own = torch.zeros(len(scores), 3)
    own[:, 0] = torch.from_numpy(np.where(sample.valid, sample.feature[:, 1] / 100, 0))
    own[:, 1] = torch.from_numpy(sample.color[:, 0] / np.float32(255))
    own[~sample.valid, 2] = 5.0
    torch.testing.assert_close(scores / scores.sum(dim=1, keepdim=True), own.softmax(dim=1), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    """Rooms whose features hold the number of their point."""
    return make_cache(tmp_path_factory.mktemp("numbered") / "c", train=1, val=1, points=300, numbered=True)


# --- what a user sees -----------------------------------------------------------------------------------------------


def test_no_two_protocols_share_a_file(run: Path) -> None:
    calls = [{}, {"checkpoint": "last"}, {"protocol": "full"}, {"protocol": "full", "tta": "waymo"}, {"split": "train"}]
    kept = [evaluate(run, device="cpu", **call) for call in calls]  # type: ignore[arg-type]
    files = {path.name: json.loads(path.read_text()) for path in (run / "eval").iterdir()}
    assert set(files) == {
        "val-best-fast.json", "val-last-fast.json", "val-best-full.json", "val-best-full-waymo.json",
        "train-best-fast.json",
    }  # fmt: skip
    assert sorted(map(str, files.values())) == sorted(map(str, kept))
    for name, results in files.items():
        assert results["protocol"] in name and ("tta" in results) == ("full" in name)
        assert results["split"] in name and results["checkpoint"] in name


def test_result_that_cannot_be_kept_is_still_given(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "run.json", "best.pt"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "eval").write_text("in the way")
    assert evaluate(copy, device="cpu")["mIoU"] is not None
    assert "cannot be written" in caplog.text


def test_one_sample_by_either_protocol(run: Path, cache: Path) -> None:
    trained = load_run(run, device="cpu")
    sample = open_cache(cache).read("room04")
    fast, full = (predict_sample(trained, "room04", protocol) for protocol in ("fast", "full"))
    turned = predict_sample(trained, "room04", "full", tta="waymo")
    assert fast.shape == full.shape == turned.shape == sample.segment.shape  # type: ignore[union-attr]
    dataset = trained.dataset("val")
    predictor = FullPredictor(trained.model, dataset, FullProtocol(), CPU)
    assert (full[sample.source_index] == predictor.predict(FullSamples(dataset)[0])).all()
    assert (full != fast).any() and (full == fast).mean() > 0.7


def test_wrong_use(run: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'full'"):
        evaluate(run, protocol="ful")
    with pytest.raises(UnknownNameError, match="did you mean 'scannet'"):
        evaluate(run, protocol="full", tta="scanet")
    with pytest.raises(UsageError, match="--protocol full"):
        evaluate(run, tta="scannet")
    with pytest.raises(UsageError, match="--protocol full"):
        predict_sample(load_run(run, device="cpu"), "room04", tta="scannet")
    for settings_ in ({"points_per_pass": 0}, {"pre_grid_size": 0.0}, {"tta": ()}):
        with pytest.raises(UsageError, match="expected"):
            FullProtocol(**settings_)  # type: ignore[arg-type]
    unlabelled = make_cache(tmp_path / "u", points=50, without=("segment",))
    for protocol in ("fast", "full"):
        with pytest.raises(MissingDataError, match=r"no 'segment'.*--submission"):
            evaluate(run, protocol=protocol, cache=str(unlabelled), device="cpu")
    empty = make_cache(tmp_path / "e", train=1, val=1, points=0)
    with pytest.raises(DataError, match="no points"):
        evaluate(run, protocol="full", cache=str(empty), device="cpu", split="train")


def test_a_distillation_has_no_scores(cache: Path, tmp_path: Path) -> None:
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1]}
    distillation = recipe(cache, task="distill", model={"backbone": backbone}, training={"steps": 1})
    train(distillation, tmp_path / "d", device="cpu", quiet=True)
    for protocol in ("fast", "full"):
        with pytest.raises(UsageError, match="distillation"):
            evaluate(tmp_path / "d", protocol=protocol, device="cpu")


def test_a_network_that_reads_points_only(cache: Path, tmp_path: Path) -> None:
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1]}
    train(
        recipe(cache, vfm=None, model={"backbone": backbone}, training={"steps": 2}, evaluation={"tta": "waymo"}),
        tmp_path / "p", device="cpu", quiet=True,
    )  # fmt: skip
    results = evaluate(tmp_path / "p", protocol="full", device="cpu")
    assert results["tta"] == "waymo" and results["mIoU"] is not None
    trained = load_run(tmp_path / "p", device="cpu")
    dataset = trained.dataset("val")
    scores = FullPredictor(trained.model, dataset, FullProtocol(), CPU).scores(FullSamples(dataset)[1])
    expected, _ = reference_full(
        trained.model, without_features(read_points(open_cache(cache), dataset.ids[1])), TTA[:1]
    )
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-4)
