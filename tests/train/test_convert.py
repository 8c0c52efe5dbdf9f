"""Runs written as Pointcept's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ditr_cache.errors import DataError, MismatchError, MissingDataError, StorageError, UsageError
from ditr_train.checkpoint import load_checkpoint, save_checkpoint, used_weights
from ditr_train.cli import main
from ditr_train.convert import convert
from ditr_train.initialise import initialise
from ditr_train.models.build import build_segmentor
from ditr_train.trainer import train
from pointcept_reference import networks
from runs import DISTILL, PLAIN, recipe

BACKBONES: dict[str, dict[str, Any]] = {name: net["backbone"] for name, net in networks().items()}
OUTDATED = BACKBONES.pop("PT-v3m1 of v1.5.1")
ONE_STEP: dict[str, Any] = {"training__epochs": None, "training__steps": 1}


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one step of each network, and a distillation."""
    root = tmp_path_factory.mktemp("runs")
    for name, backbone in BACKBONES.items():
        settings = {**PLAIN, **ONE_STEP, "model__backbone": backbone, "training__ema": 0.9}
        train(recipe(tiny_cache, **settings), root / name, device="cpu", quiet=True)
    signed = [{"name": "ChromaticNormalize", "args": {"mean": [0.5] * 3, "std": [0.5] * 3}}]
    settings = {**DISTILL, **ONE_STEP, "model__backbone": BACKBONES["SpUNet-v1m1"], "splits": {"val": None}}
    settings |= {"data__at_test": signed}
    train(recipe(tiny_cache, **settings), root / "distill", device="cpu", quiet=True)
    return {path.name: path for path in root.iterdir()}


def content(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(path, weights_only=True)
    return values


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(arg) for arg in args])
    return int(done.value.code or 0)


@pytest.mark.parametrize("name", BACKBONES)
def test_there_and_back_is_exact(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    done = convert(runs[name], tmp_path / "public.pth", checkpoint="last")
    written = content(tmp_path / "public.pth")
    assert set(written) == {"epoch", "state_dict", "ditr_version"} and written["epoch"] == 1
    theirs = networks()[name]["tensors"]
    head = "backbone.final" if name == "SpUNet-v1m1" else "seg_head"
    backbone = {f"backbone.{n}" for n in theirs if not n.startswith("final.") and n != "embedding.mask_token"}
    assert set(written["state_dict"]) == backbone | {f"{head}.weight", f"{head}.bias"}
    for key, shape in theirs.items():
        if f"backbone.{key}" in backbone:
            assert list(written["state_dict"][f"backbone.{key}"].shape) == shape, key

    of = recipe(None, **PLAIN, model__backbone=BACKBONES[name], init="file", init_format="pointcept")
    model = build_segmentor(of.model, in_channels=6, num_classes=3)
    initialise(model, str(tmp_path / "public.pth"), of)
    ours = used_weights(load_checkpoint(runs[name] / "last.pt"))
    assert len(ours) == done["tensors"] == len(written["state_dict"])
    assert all(torch.equal(v, ours[f"backbone.{k}"]) for k, v in model.backbone.state_dict().items())
    assert done["parameters"] == sum(p.numel() for p in model.parameters())
    assert done["step"] == 1 and done["classes"] == ["floor", "wall", "picture"] and done["feat"] == ["color", "normal"]


def test_the_head_gives_the_same_scores_there(runs: dict[str, Path], tmp_path: Path) -> None:
    """A convolution of one voxel, whose weight spconv reads as [in, out]."""
    convert(runs["SpUNet-v1m1"], tmp_path / "public.pth")
    weight = content(tmp_path / "public.pth")["state_dict"]["backbone.final.weight"]
    assert weight.shape == (3, 1, 1, 1, 8) and weight.is_contiguous()
    ours = used_weights(load_checkpoint(runs["SpUNet-v1m1"] / "best.pt"))["head.weight"]
    assert torch.equal(weight.view(8, 3), ours.T)


def test_a_distillation_is_written_without_its_head(runs: dict[str, Path], tmp_path: Path) -> None:
    done = convert(runs["distill"], tmp_path / "public.pth", checkpoint="last")
    assert done["colors"] == "as ChromaticNormalize leaves them"
    written = content(tmp_path / "public.pth")
    assert written["epoch"] == 0 and not any(".final." in name for name in written["state_dict"])
    assert done["head"] is False and done["classes"] == [] and done["model"]["backbone"]["num_classes"] == 0
    with pytest.raises(MissingDataError, match=r"no best\.pt yet.*--checkpoint last"):
        convert(runs["distill"], tmp_path / "other.pth")


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", runs["SpUNet-v1m1"], "-o", tmp_path / "unet.pth") == 0
    shown = capsys.readouterr().out
    assert "M parameters, with its head" in shown and "input: color, normal (colours 0 to 1), voxels of 0.1 m" in shown
    model = "model = {'type': 'DefaultSegmentor', 'backbone': {'type': 'SpUNet-v1m1', 'in_channels': 6, 'base_channels'"
    assert model in shown and "'num_classes': 3" in shown and "classes: floor, wall, picture" in shown
    assert call("convert", runs["Sonata"], "-o", tmp_path / "sonata.pth", "--to", "pointcept", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["model"]["type"] == "DefaultSegmentorV2" and done["model"]["backbone_out_channels"] == 56
    assert done["model"]["backbone"]["type"] == "PT-v3m2" and done["model"]["backbone"]["enc_mode"] is True
    assert call("convert", runs["Sonata"], "-o", tmp_path / "sonata.pth") == 2
    assert "exists already" in capsys.readouterr().err
    assert call("convert", tmp_path, "-o", tmp_path / "x.pth") == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert call("convert", runs["Sonata"], "-o", tmp_path / "x.pth", "--to", "mmdet") == 2
    assert "'mmdet' is not 'pointcept'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert call("convert", runs["Sonata"], "-o", tmp_path / "file" / "x.pth") == 1
    assert "cannot write" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_what_has_no_counterpart_is_refused(tiny_cache: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        run = tmp_path / "run"
        settings = {**PLAIN, **ONE_STEP, "model__backbone": BACKBONES["SpUNet-v1m1"], **changes}
        train(recipe(tiny_cache, **settings), run, device="cpu", quiet=True)
        with pytest.raises(error, match=match):
            convert(run, tmp_path / "public.pth")
        assert not (tmp_path / "public.pth").exists()
        run.rename(tmp_path / str(len(list(tmp_path.iterdir()))))

    refused(UsageError, r"injects VFM features: .*plain, distill, finetune", vfm="fake", model__injection={})
    odd = {**BACKBONES["SpUNet-v1m1"], "norm_eps": 1e-5}
    refused(MismatchError, r"norm_eps is 1e-05, SpUNet-v1m1 always has 0\.001", model__backbone=odd)
    refused(UsageError, r"no longer computes this variant of PT-v3m1", model__backbone=OUTDATED)
    with pytest.raises(UsageError, match=r"expected one of pointcept, got 'other'"):
        convert(runs["Sonata"], tmp_path / "public.pth", to="other")


def test_a_checkpoint_of_another_network_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["Sonata"], tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    del state["ema"]["model"]["backbone.embedding.norm.bias"]
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    with pytest.raises(DataError, match=r"lacks 'backbone\.embedding\.norm\.bias'"):
        convert(tmp_path / "run", tmp_path / "public.pth", checkpoint="last")


def test_a_full_disk_leaves_no_file(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="failed writing file; free space"):
        convert(runs["Sonata"], tmp_path / "public.pth")
    assert not list(tmp_path.iterdir())


def test_files_of_ours_say_what_they_are(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(runs["PT-v3m1"], tmp_path / "new" / "public.pth")
    settings = {**PLAIN, "init": str(tmp_path / "new" / "public.pth"), "init_format": "pointcept"}
    same = recipe(tmp_path, **settings, model__backbone=BACKBONES["PT-v3m1"])
    initialise(build_segmentor(same.model, in_channels=6, num_classes=3), str(same.init), same)
    assert "colours" not in caplog.text
    other = recipe(tmp_path, **settings, model__backbone={**BACKBONES["PT-v3m1"], "variant": "ptv3-v1.5.1"})
    with pytest.raises(MismatchError, match=r"written by ditr-train convert.*variant=ptv3"):
        initialise(build_segmentor(other.model, in_channels=6, num_classes=3), str(other.init), other)
