"""Every recipe that ships: built, trained for two steps and evaluated by its full protocol, on a cache of its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache.errors import UsageError
from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter, open_cache
from ditr_train.benchmark_labels import NUSCENES, SCANNET, SCANNET200, SEMANTICKITTI
from ditr_train.data.dataset import CachedDataset
from ditr_train.evaluate import evaluate
from ditr_train.recipe import Recipe, parse_recipe
from ditr_train.recipe_files import load_recipe, recipe_summaries
from ditr_train.report import published_line
from ditr_train.trainer import train
from ditr_train.tta import tta_set
from plain_rows import encode

SUMMARIES = recipe_summaries()
RECIPES = [name for name in SUMMARIES if not name.startswith("demo/")]
LIDAR = ("nuscenes", "semantickitti", "waymo")
INDOOR = ("scannet", "scannet200", "scannetpp", "s3dis")
DATASETS = (*INDOOR, *LIDAR)
JOINT = {"indoor": ("scannet", "structured3d"), "outdoor": LIDAR}

# What is made small: sizes alone. Every kind of layer, transform, loss, schedule and protocol stays what it is.
SMALL = {
    "sparse_unet": {"stem_channels": 4, "channels": [4, 8, 8, 8, 8, 8, 8, 4], "layers": [1] * 8},
    "ptv3": {
        "encoder_depths": [1] * 5, "encoder_channels": [8] * 5, "encoder_heads": [2] * 5, "decoder_depths": [1] * 4,
        "decoder_channels": [8] * 4, "decoder_heads": [2] * 4, "patch_size": 32,
    },
    "pointnext": {"width": 4, "blocks": [1, 1, 1, 1], "num_neighbors": 8},
}  # fmt: skip
TINY = ("data.batch_size=2", "data.workers=0", "training.epochs=null", "training.steps=2", "tracking.tensorboard=false")


@cache
def shipped(name: str) -> Recipe:
    """A recipe as it ships."""
    return load_recipe(name)


def dataset_cache(root: Path, dataset: str, classes: Sequence[str], splits: Sequence[str], spec: VFMSpec) -> Path:
    """Two samples a split, one in `val`, with all that recipes ask for; each third point has no feature."""
    lidar = dataset in LIDAR
    metadata = CacheMetadata(
        dataset=dataset,
        class_names=tuple(classes),
        class_colors=tuple((i % 256, 90, 200) for i in range(len(classes))),
        links=LinkSettings(),
    )
    writer = CacheWriter.create(root, metadata)
    for i, split in enumerate(name for name in splits for _ in range(1 if name == "val" else 2)):
        rng, n = np.random.default_rng(i), 240 + 10 * i
        coord = rng.normal(size=(n, 3)) * ((30, 30, 1) if lidar else (0.4, 0.4, 0.3))
        seen = np.arange(n) % 3 > 0
        arrays = {
            "coord": coord.astype(np.float32),
            "segment": np.where(np.arange(n) % 7, rng.integers(0, len(classes), n), -1).astype(np.int16),
            "instance": (np.arange(n) % 6 - 1).astype(np.int32),
            "source_index": np.arange(n, dtype=np.uint32),
            "offset": np.array([n], dtype=np.int64),
            "link_point": np.flatnonzero(seen).astype(np.uint32),
            "link_uv": np.zeros((int(seen.sum()), 2), dtype=np.uint16),
            "link_depth": np.ones(int(seen.sum()), dtype=np.float16),
        }
        if lidar:
            arrays["strength"] = rng.random(n).astype(np.float32)
        else:
            arrays["color"] = rng.integers(0, 256, (n, 3), dtype=np.uint8)
            arrays["normal"] = (coord / np.linalg.norm(coord, axis=1, keepdims=True)).astype(np.float16)
        sample = f"{dataset}{i}"
        view = ViewInfo(id="0", links=int(seen.sum()))
        info = SampleInfo(id=sample, split=split, points=n, linked_points=int(seen.sum()), views=(view,))
        record = writer.commit_geometry(sample, [info], arrays)
        index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
        rows = rng.normal(size=(int(seen.sum()), spec.dim)).astype(np.float32)
        writer.commit_features(spec, record, encode(rows, spec.codec), index, images=1)
    return root


@dataclass
class Workshop:
    """Makes caches and runs, each once."""

    root: Path
    spec: VFMSpec
    caches: dict[str, Path] = field(default_factory=dict)
    runs: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)

    def cache(self, dataset: str) -> Path:
        if dataset not in self.caches:
            method = "distill" if dataset == "structured3d" else "plain"
            recipe = shipped(f"{dataset}/{method}")
            assert recipe.classes is not None and recipe.dataset == dataset
            splits = ("train", "val", "test") if dataset == "structured3d" else ("train", "val")
            self.caches[dataset] = dataset_cache(self.root / dataset, dataset, recipe.classes, splits, self.spec)
        return self.caches[dataset]

    def recipe(self, name: str) -> Recipe:
        """The recipe with small sizes and caches of this workshop."""
        folder, _, method = name.partition("/")
        as_shipped = shipped(name)
        backbone = as_shipped.model.backbone.name
        overrides = [*TINY, *(f"model.backbone.{key}={value}" for key, value in SMALL[backbone].items())]
        if as_shipped.data.point_max is not None:
            overrides.append("data.point_max=200")
        if folder in JOINT:
            overrides += [f"sources.{i}.cache={self.cache(dataset)}" for i, dataset in enumerate(JOINT[folder])]
        else:
            overrides.append(f"cache={self.cache(folder)}")
        if as_shipped.init_format != "run":  # the file is the user's; reading such files has tests of its own
            overrides += ["init=null", "init_format=run"]
        elif as_shipped.init is not None:
            source = method.replace("finetune-layerwise", "finetune").replace("finetune", "distill")
            overrides.append(f"init={self.run(f'{folder}/{source}')[0]}")
        return load_recipe(name, overrides)

    def run(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Run folder and results of a recipe."""
        if name not in self.runs:
            out = self.root / "runs" / name
            self.runs[name] = out, train(self.recipe(name), out, device="cpu", quiet=True)
        return self.runs[name]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_spec: Callable[..., VFMSpec]) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("published"), make_spec("dinov2-large"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_is_evaluated_by_its_protocol(name: str, workshop: Workshop) -> None:
    run, done = workshop.run(name)
    assert done["steps"] == 2
    recipe = shipped(name)
    if recipe.task == "distill":
        if name.startswith("structured3d/"):
            assert done["last"] is None
        else:
            assert math.isfinite(done["last"]["cosine"])
        return
    result = evaluate(run, protocol="full", checkpoint="last", device="cpu")
    assert result["pre_grid_size"] == recipe.evaluation.pre_grid_size
    assert result["fragments"] >= len(tta_set(recipe.evaluation.tta))
    assert 0 <= result["mIoU"] <= 1 and len(result["IoU"]) == len(recipe.classes or ())


def test_instances_are_read_for_their_transforms(workshop: Workshop) -> None:
    cache = open_cache(workshop.cache("scannet"))
    for name, read in (("scannet/plain-strong", True), ("scannet/plain", False)):
        data = shipped(name).data
        dataset = CachedDataset(cache, "train", **data.reading(), **data.training())
        stored, points = dataset.read(0)
        assert (points.instance is not None) == read
        assert not read or np.array_equal(points.instance, stored.instance)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_has_every_method_and_backbone(dataset: str) -> None:
    for backbone, suffix in (("sparse_unet", ""), ("ptv3", "-ptv3")):
        plain, inject, distill, finetune = (
            shipped(f"{dataset}/{method}{suffix}") for method in ("plain", "inject", "distill", "finetune")
        )
        for recipe in (plain, inject, distill, finetune):
            assert recipe.model.backbone.name == backbone and recipe.dataset == dataset
        assert plain.vfm is None is plain.init and inject.vfm is not None and inject.model.injection is not None
        assert distill.task == "distill" and finetune.init is not None and finetune.vfm is None
        # A backbone can only be handed on between equal ones that read the same.
        assert distill.model.backbone == finetune.model.backbone and distill.data.feat == finetune.data.feat


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("arms", [("plain-matched", "inject"), ("plain-ptv3", "inject-ptv3")])
def test_the_baseline_of_injection_differs_in_the_images_alone(dataset: str, arms: tuple[str, str]) -> None:
    plain, inject = (shipped(f"{dataset}/{arm}").model_dump() for arm in arms)
    for values in (plain, inject):
        for key in ("description", "published", "vfm"):
            del values[key]
    assert inject["model"].pop("injection") and plain["model"].pop("injection") is None
    assert plain == inject


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_its_target_or_why_there_is_none(name: str) -> None:
    published, summary = shipped(name).published, SUMMARIES[name]
    assert published is not None and published == summary.published
    assert summary.description and len(summary.description) < 120
    assert (published.miou is None) == (published.source is None)
    if published.miou is not None:
        assert published.split == ("Area 5" if name.startswith("s3dis/") else "val")


# mIoU as published, read from ../reference by hand: these are the numbers to reach.
TARGETS = {
    "scannet": (72.3, 76.8, 80.5, 78.6), "scannet200": (25.0, 35.4, 41.2, 37.2), "scannetpp": (28.8, None, None, None),
    "s3dis": (66.3, 72.1, 74.1, 75.0), "nuscenes": (73.3, 79.9, 83.1, 80.9), "semantickitti": (63.8, 68.3, 69.0, 69.8),
    "waymo": (65.9, 71.5, 73.3, 71.6),
}  # fmt: skip


@pytest.mark.parametrize("dataset", DATASETS)
def test_targets(dataset: str) -> None:
    names = ("plain", "plain-ptv3", "inject-ptv3", "finetune-ptv3")
    found = [shipped(f"{dataset}/{name}").published for name in names]
    assert tuple(p.miou for p in found if p is not None) == TARGETS[dataset]


def settings(recipe: Recipe) -> tuple[Any, ...]:
    """Budget, batch, optimiser (with the lowest learning rate), voxels, crop, mixing."""
    lowest = min([1.0, *(group.lr_scale for group in recipe.optimizer.groups)])
    return (
        recipe.training.epochs, recipe.data.batch_size, recipe.optimizer.name, recipe.optimizer.lr, lowest,
        recipe.optimizer.weight_decay, recipe.schedule.name, recipe.data.grid_size, recipe.data.crop_rate,
        recipe.data.point_max, recipe.data.mix_prob, recipe.loss.lovasz_weight,
    )  # fmt: skip


# The tables of DITR (section 1) and Pointcept (section 5) once more, as a second writing-down of the same facts.
SETTINGS = {
    "scannet/plain": (800, 12, "sgd", 0.05, 1, 1e-4, "onecycle", 0.02, None, 100000, 0.8, 0),
    "scannet200/plain": (600, 12, "sgd", 0.05, 1, 1e-4, "onecycle", 0.02, None, 100000, 0.8, 0),
    "scannetpp/plain": (800, 12, "sgd", 0.05, 1, 1e-4, "onecycle", 0.02, None, 204800, 0.8, 0),
    "s3dis/plain": (3000, 12, "sgd", 0.1, 1, 1e-4, "poly", 0.05, None, 100000, 0.8, 0),
    "nuscenes/plain": (50, 12, "adamw", 2e-3, 1, 5e-3, "onecycle", 0.05, None, None, 0, 0),
    "semantickitti/plain": (50, 12, "adamw", 2e-3, 1, 5e-3, "onecycle", 0.05, None, None, 0.8, 0),
    "waymo/plain": (50, 12, "adamw", 2e-3, 1, 5e-3, "onecycle", 0.05, None, None, 0.8, 1),
    "scannet/inject-ptv3": (800, 12, "adamw", 6e-3, 0.1, 0.05, "onecycle", 0.02, None, 102400, 0.8, 1),
    "scannet200/inject-ptv3": (800, 12, "adamw", 6e-3, 0.1, 0.05, "onecycle", 0.02, None, 102400, 0.8, 1),
    "scannetpp/inject-ptv3": (800, 12, "adamw", 6e-3, 0.1, 0.05, "onecycle", 0.02, None, 204800, 0.8, 1),
    "s3dis/inject-ptv3": (3000, 12, "adamw", 6e-3, 0.1, 0.05, "onecycle", 0.02, 0.6, 204800, 0.8, 1),
    "nuscenes/inject-ptv3": (50, 12, "adamw", 2e-3, 0.1, 5e-3, "onecycle", 0.05, None, None, 0.8, 1),
    "semantickitti/inject-ptv3": (50, 12, "adamw", 2e-3, 0.1, 5e-3, "onecycle", 0.05, None, None, 0.8, 1),
    "waymo/inject-ptv3": (50, 12, "adamw", 2e-3, 0.1, 5e-3, "onecycle", 0.05, None, None, 0.8, 1),
    "indoor/distill-ptv3": (800, 12, "adamw", 6e-3, 0.1, 0.05, "onecycle", 0.02, None, 102400, 0.8, 1),
    "outdoor/distill-ptv3": (50, 12, "adamw", 2e-3, 0.1, 5e-3, "onecycle", 0.05, None, None, 0.8, 1),
    "s3dis/finetune-layerwise-ptv3": (300, 12, "adamw", 6e-3, 0.01, 0.05, "onecycle", 0.02, 0.6, 204800, 0.8, 1),
    "scannet200/plain-strong": (400, 16, "adamw", 6e-3, 1, 0.05, "onecycle", 0.02, 0.6, None, 0.85, 1),
    "nuscenes/plain-strong": (50, 16, "adamw", 2e-3, 1, 0.05, "onecycle", 0.05, 0.6, None, 0.85, 1),
    "s3dis/plain-pointnext": (100, 8, "adamw", 0.01, 1, 1e-4, "cosine", 0.04, None, 24000, 0, 0),
    "scannet/plain-pointnext": (100, 16, "adamw", 1e-3, 1, 1e-4, "multistep", 0.02, None, 64000, 0, 0),
    "scannet/finetune-sonata": (800, 24, "adamw", 2e-3, 0.1, 0.02, "onecycle", 0.02, None, 102400, 0.8, 1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_runs_are_evaluated_as_often_as_published(name: str) -> None:
    """100 times indoors, where Pointcept's `epoch` is cut into `eval_epoch` parts, and after each epoch outdoors."""
    training = shipped(name).training
    if name.partition("/")[0] in (*LIDAR, "outdoor"):
        assert training.evaluate_every == 1
    else:
        assert training.epochs == 100 * training.evaluate_every


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(name: str) -> None:
    assert settings(shipped(name)) == SETTINGS[name]


def test_schedules_input_protocol_and_loss_are_the_published_ones() -> None:
    def onecycle(name: str) -> tuple[float, float, float]:
        schedule = shipped(name).schedule
        return schedule.pct_start, schedule.div_factor, schedule.final_div_factor

    assert onecycle("scannet200/plain") == (0.05, 10, 1e4) and onecycle("s3dis/inject-ptv3") == (0.05, 10, 1000)
    assert onecycle("waymo/plain") == onecycle("semantickitti/inject-ptv3") == (0.04, 10, 100)
    assert shipped("s3dis/plain").data.feat == ("coord", "color") and shipped("s3dis/inject").data.feat == (
        "color",
        "normal",
    )
    assert shipped("scannet200/plain").data.feat == ("coord", "color", "normal")
    assert shipped("scannet200/plain-ptv3").data.feat == ("color", "normal")
    for dataset in LIDAR:
        assert shipped(f"{dataset}/plain").data.feat == shipped(f"{dataset}/inject").data.feat == ("coord", "strength")
        assert (
            not shipped(f"{dataset}/plain").data.center
            and shipped(f"{dataset}/plain").evaluation.pre_grid_size == 0.025
        )
    assert shipped("semantickitti/inject").evaluation.pre_grid_size == 0.01
    copies = {dataset: len(tta_set(shipped(f"{dataset}/inject-ptv3").evaluation.tta)) for dataset in DATASETS}
    assert copies == {
        "scannet": 13, "scannet200": 13, "scannetpp": 13, "s3dis": 10, "nuscenes": 10, "semantickitti": 4, "waymo": 4,
    }  # fmt: skip
    assert len(tta_set(shipped("scannet200/plain").evaluation.tta)) == 4
    assert len(tta_set(shipped("s3dis/plain-pointnext").evaluation.tta)) == 1
    weights = shipped("semantickitti/inject").loss.class_weights
    assert weights is not None and len(weights) == 19 and weights[7] == max(weights) == 10.1922
    assert (
        shipped("scannet/plain-strong").loss.label_smoothing == 0.1
        and shipped("scannet/inject").loss.label_smoothing == 0
    )
    injection = shipped("nuscenes/inject-ptv3").model.injection
    assert injection is not None and (injection.decoder, injection.pool) == ("all", "zero_max")


def test_augmentations_are_the_published_sets() -> None:
    def names(name: str) -> list[str]:
        return [transform.name for transform in shipped(name).data.augment]

    rotations = ["RandomRotate"] * 3
    indoor = ["RandomDropout", *rotations, "RandomScale", "RandomFlip", "RandomJitter", "ElasticDistortion"]
    color = ["ChromaticAutoContrast", "ChromaticTranslation", "ChromaticJitter"]
    for name in ("scannet/plain", "scannet200/inject-ptv3", "scannetpp/inject", "s3dis/plain", "indoor/distill-ptv3"):
        assert names(name) == [*indoor, *color]
    assert names("s3dis/inject-ptv3") == [*indoor[:-1], *color]
    lidar = ["RandomRotate", "RandomScale", "RandomFlip", "RandomJitter"]
    assert names("nuscenes/plain") == names("nuscenes/inject-ptv3") == lidar
    for name, edge in (("semantickitti/inject", 35.2), ("waymo/plain-ptv3", 75.2)):
        recipe = shipped(name)
        assert names(name) == ["RandomRotate", "PointClip", *lidar[1:]]
        assert recipe.data.at_test[0] == recipe.data.augment[1]
        assert recipe.data.at_test[0].args == {"low": [-edge, -edge, -4], "high": [edge, edge, 2]}
    joint = shipped("outdoor/distill-ptv3")
    for source, dataset in zip(joint.sources, LIDAR, strict=True):
        own, alone = source.data(joint.data), shipped(f"{dataset}/distill-ptv3").data
        assert own.transforms() == alone.transforms() and own.at_test == alone.at_test


def test_classes_are_in_the_order_of_the_benchmarks() -> None:
    for dataset, labels in (
        ("scannet", SCANNET), ("scannet200", SCANNET200), ("semantickitti", SEMANTICKITTI), ("nuscenes", NUSCENES),
    ):  # fmt: skip
        assert shipped(f"{dataset}/plain").classes == tuple(labels)
    counts = {"scannetpp": 100, "s3dis": 13, "waymo": 22}
    for dataset, count in counts.items():
        classes = shipped(f"{dataset}/plain").classes
        assert classes is not None and len(set(classes)) == len(classes) == count
    assert len(shipped("structured3d/distill").classes or ()) == 25


def test_the_end_of_a_run_names_its_target() -> None:
    line = published_line(shipped("s3dis/inject-ptv3").published)
    source = "DITR (arXiv 2503.18944), tables 1-2"
    assert line == f"published  mIoU 74.1 Area 5 (full protocol, the recipe as it ships; {source})"
    assert published_line(shipped("s3dis/inject").published) == published_line(None) == ""


def test_a_note_or_a_source_is_required() -> None:
    values = {"data": {"grid_size": 1, "feat": ["coord"], "batch_size": 1}, "training": {"epochs": 1}}
    for published in ({}, {"miou": 50.0}, {"source": "a paper"}):
        with pytest.raises(UsageError, match=r"published: expected a source .* a note"):
            parse_recipe({**values, "published": published})


def test_the_page_lists_every_recipe_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text()
    for name in RECIPES:
        assert table_row(name) in page.splitlines(), f"{name}: the row should be\n{table_row(name)}"
    rows = [line for line in page.splitlines() if line.startswith("| `") and "/" in line]
    assert len(rows) == len(RECIPES)


def table_row(name: str) -> str:
    """A recipe's row of pipelines/README.md."""
    recipe = shipped(name)
    data, optimizer, published = recipe.data, recipe.optimizer, recipe.published
    assert published is not None
    crop = [
        f"{limit:g}" if limit <= 1 else f"{limit}" for limit in (data.crop_rate, data.point_max) if limit is not None
    ]
    schedule = f"{optimizer.name} {optimizer.lr:g} / {optimizer.weight_decay:g}, {recipe.schedule.name}"
    loop = f" x {data.loop}" if data.loop > 1 else ""
    target = "-" if published.miou is None else f"{published.miou:.1f} {published.split}"
    tta = recipe.evaluation.tta if recipe.task == "segment" else "-"
    cells = (
        f"`{name}`", f"{recipe.training.epochs}{loop}", data.batch_size, schedule, f"{data.grid_size:g}",
        ", then ".join(crop) or "-", f"{data.mix_prob:g}", tta, target,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"
