"""Every backbone in everything that a run can be: distilled, fine-tuned, injected, evaluated, used on a file."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditr_cache.errors import MismatchError, UsageError
from ditr_cache.store import open_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import collate
from ditr_train.evaluate import evaluate
from ditr_train.models.build import build_segmentor
from ditr_train.models.config import BACKBONES, InjectionConfig, ModelConfig
from ditr_train.predict import predict_inputs
from ditr_train.trainer import TrainingInterruptedError, train
from runs import DISTILL, PLAIN, VALUES, assert_same_run, recipe, stop_at

SETTINGS: dict[str, dict[str, Any]] = {
    "sparse_unet": VALUES["model"]["backbone"],
    "ptv3": {
        "name": "ptv3", "encoder_depths": [1, 1, 1], "encoder_channels": [8, 16, 16], "encoder_heads": [2, 2, 2],
        "decoder_depths": [1, 1], "decoder_channels": [8, 16], "decoder_heads": [2, 2], "patch_size": 48,
        "norm_momentum": 0.1,
    },
    "pointnext": {
        "name": "pointnext", "width": 8, "strides": [4, 4], "blocks": [1, 1], "radius": 0.2, "num_neighbors": 8,
    },
}  # fmt: skip


@pytest.fixture(params=SETTINGS)
def backbone(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


def test_no_backbone_is_left_out() -> None:
    assert SETTINGS.keys() == BACKBONES.keys()


def test_distilled_fine_tuned_evaluated_and_used(backbone: dict[str, Any], tiny_cache: Path, tmp_path: Path) -> None:
    budget = {"model__backbone": backbone, "training__epochs": 1}
    distilled = recipe(tiny_cache, **DISTILL, **budget)
    assert "cosine" in train(distilled, tmp_path / "distilled", device="cpu", quiet=True)["last"]
    tuned = recipe(tiny_cache, **PLAIN, **budget, init=str(tmp_path / "distilled"))
    train(tuned, tmp_path / "tuned", device="cpu", quiet=True)
    init = json.loads((tmp_path / "tuned" / "run.json").read_text())["init"]
    assert init["fresh"] == ["head.weight", "head.bias"] and init["parameters"] > 1000
    scored = evaluate(tmp_path / "tuned", protocol="full", tta="semantickitti", device="cpu", quiet=True)
    assert 0 <= scored["mIoU"] <= 1
    predict_inputs(tmp_path / "tuned", ["room04"], tmp_path / "out", device="cpu", quiet=True)
    labels = np.load(tmp_path / "out" / "room04.labels.npy")
    assert labels.shape == (1540,) and set(labels.tolist()) <= {0, 1, 2}


def test_learns_what_only_the_features_tell(backbone: dict[str, Any], tiny_cache: Path, tmp_path: Path) -> None:
    injected = recipe(
        tiny_cache, model__backbone=backbone, model__injection={}, data__augment=[], data__mix_prob=0.0,
        training__epochs=40, training__evaluate_every=40,
    )  # fmt: skip
    done = train(injected, tmp_path / "run", device="cpu", quiet=True)
    assert done["last"]["mIoU"] > 0.8


def test_interrupted_and_resumed_equals_uninterrupted(
    backbone: dict[str, Any], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe(tiny_cache, model__backbone=backbone)
    train(loaded, tmp_path / "whole", device="cpu", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(TrainingInterruptedError, match="after step 4 of 6"):
            train(loaded, tmp_path / "run", device="cpu", quiet=True)
    train(loaded, tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("pool", ["mean", "max", "zero_max"])
def test_every_place_gets_a_gradient_and_every_parameter_is_used(
    backbone: dict[str, Any], pool: str, tiny_cache: Path
) -> None:
    config = BACKBONES[backbone.get("name", "sparse_unet")](**backbone)
    levels = tuple(range(config.num_stages + 1))
    injection = InjectionConfig(encoder=levels, input=True, visibility_flag=True, pool=pool)  # type: ignore[arg-type]
    data = CachedDataset(open_cache(tiny_cache), "train", grid_size=0.1, feat=["color"], vfm="fake")
    batch = collate([data.train_sample(i, np.random.default_rng(i)) for i in range(2)])
    torch.manual_seed(0)
    model = build_segmentor(
        ModelConfig(backbone=config, injection=injection), in_channels=3, num_classes=3, feature_dim=8
    )
    model(batch).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    with pytest.raises(UsageError, match=f"whose encoder has 0 to {levels[-1]}"):
        ModelConfig(backbone=config, injection=InjectionConfig(encoder=(levels[-1] + 1,)))


def test_a_backbone_without_decoder_takes_features_in_its_encoder(tiny_cache: Path) -> None:
    alone = {**SETTINGS["ptv3"], "decoder_depths": [], "decoder_channels": [], "decoder_heads": []}
    for injection in ({}, {"decoder": [0], "encoder": [1]}):
        with pytest.raises(UsageError, match=r"no decoder; name resolutions of its encoder .*\(0 to 2\)"):
            recipe(tiny_cache, model__backbone=alone, model__injection=injection)
    model = recipe(tiny_cache, model__backbone=alone, model__injection={"encoder": [0, 2]}).model
    data = CachedDataset(open_cache(tiny_cache), "train", grid_size=0.1, feat=["color"], vfm="fake")
    network = build_segmentor(model, in_channels=3, num_classes=3, feature_dim=8)
    scores = network(collate([data.train_sample(0, np.random.default_rng(0))]))
    assert network.head.in_features == 8 + 16 + 16 and scores.isfinite().all()


def test_fine_tuning_may_train_otherwise(tiny_cache: Path, tmp_path: Path) -> None:
    once = {"training__epochs": None, "training__steps": 1}
    first = recipe(tiny_cache, **DISTILL, **once, model__backbone=SETTINGS["ptv3"])
    train(first, tmp_path / "first", device="cpu", quiet=True)
    other = {**SETTINGS["ptv3"], "drop_path": 0.0, "norm_momentum": 0.2, "shuffle_orders": False}
    again = recipe(tiny_cache, **PLAIN, **once, model__backbone=other, init=str(tmp_path / "first"))
    train(again, tmp_path / "run", device="cpu", quiet=True)


def test_samples_of_a_batch_do_not_see_each_other(backbone: dict[str, Any], tiny_cache: Path) -> None:
    config = BACKBONES[backbone.get("name", "sparse_unet")](**backbone)
    data = CachedDataset(open_cache(tiny_cache), "val", grid_size=0.1, feat=["coord"], vfm="fake")
    samples = [data.eval_sample(i) for i in range(2)]
    torch.manual_seed(0)
    model = build_segmentor(
        ModelConfig(backbone=config, injection=InjectionConfig()), in_channels=3, num_classes=3, feature_dim=8
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    with torch.no_grad():
        together = model(collate(samples))
        alone = torch.cat([model(collate([sample])) for sample in samples])
    assert together.std() > 0.02
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_weights_of_another_backbone_are_refused(tiny_cache: Path, tmp_path: Path) -> None:
    once = {"training__epochs": None, "training__steps": 1}
    train(recipe(tiny_cache, **PLAIN, **once), tmp_path / "unet", device="cpu", quiet=True)
    other = recipe(tiny_cache, **PLAIN, **once, model__backbone=SETTINGS["ptv3"], init=str(tmp_path / "unet"))
    with pytest.raises(MismatchError, match=r"backbone\.name is sparse_unet there and ptv3 in this recipe"):
        train(other, tmp_path / "run", device="cpu", quiet=True)
