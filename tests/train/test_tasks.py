"""Distillation and fine-tuning as runs: from one cache or several, from weights taken over, exactly resumable."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditr_cache.errors import MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_cache.store import open_cache
from ditr_train.checkpoint import load_checkpoint
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import collate
from ditr_train.distributed import Processes
from ditr_train.models.build import build_distiller
from ditr_train.models.distillation import Distiller
from ditr_train.run_folder import RunFolder
from ditr_train.tasks import open_task
from ditr_train.tracking import read_metrics
from ditr_train.trained import load_run
from ditr_train.trainer import DivergedError, Trainer, TrainingInterruptedError, train
from runs import DISTILL, ONE_THREAD, PLAIN, assert_same_run, recipe, stop_at

Make = Callable[..., Path]
MakeSpec = Callable[..., VFMSpec]


@pytest.fixture(scope="module")
def distilled(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "distilled"
    train(recipe(tiny_cache, **DISTILL, training__epochs=6), run, device="cpu", quiet=True)
    return run


def steps_of(**settings: Any) -> dict[str, Any]:
    return {"training__epochs": None, "training__steps": 1, **settings}


# --- distillation ---------------------------------------------------------------------------------------------------


def test_distillation_learns_without_labels(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", without=("segment",), classes=())
    done = train(recipe(cache, **DISTILL, training__epochs=12), tmp_path / "run", device="cpu", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    cosines = [line["cosine"] for line in lines if line["kind"] == "val"]
    assert done["last"]["cosine"] == cosines[-1] > cosines[0] + 0.02 and done["last"]["voxels"] > 100
    assert done["best"]["cosine"] == max(cosines)
    with pytest.raises(UsageError, match=r"is a distillation.*--set init="):
        load_run(tmp_path / "run", device="cpu")


def test_the_cosine_is_that_of_all_voxels_with_a_feature(distilled: Path, tiny_cache: Path) -> None:
    model = network_of(distilled)
    data = CachedDataset(open_cache(tiny_cache), "val", grid_size=0.1, feat=("color", "normal"), vfm="fake")
    cosines: list[float] = []
    for i in range(len(data)):
        batch = collate([data.eval_sample(i)])
        assert batch.features is not None and batch.features.scale is not None
        rows = batch.features.table.float() * batch.features.scale[:, None]
        with torch.inference_mode():
            predicted = model.head(model.point_features(batch))
        for voxel, row in enumerate(batch.features.index.tolist()):
            if row >= 0:
                a, b = predicted[voxel].double().numpy(), rows[row].double().numpy()
                cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    last = [line for line in read_metrics(distilled / "metrics.jsonl") if line["kind"] == "val"][-1]
    assert last["voxels"] == len(cosines) and last["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)


def network_of(run: Path) -> Distiller:
    loaded, info = RunFolder(run).open()
    assert info.vfm is not None
    model = build_distiller(loaded.model, in_channels=info.in_channels, feature_dim=info.vfm["dim"])
    model.load_state_dict(load_checkpoint(run / "last.pt")["model"])
    return model.eval()


def test_several_caches_share_one_head(tmp_path: Path, make_cache: Make, make_spec: MakeSpec) -> None:
    first = make_cache(tmp_path / "a", train=3, val=1, points=300)
    # Another dataset has images of another size, and classes of its own.
    second = make_cache(
        tmp_path / "b", train=2, val=2, points=300, seed=1, classes=("road", "car", "tree", "sky"),
        specs=(make_spec(image_size=(14, 56), grid=(1, 4)),),
    )  # fmt: skip
    sources = [
        {"cache": str(first), "ratio": 1},
        {"cache": str(second), "ratio": 4, "splits": {"train": ["train", "val"], "val": None}},
    ]
    loaded = recipe(None, **DISTILL, sources=sources, data__mix_prob=1.0, training__epochs=2)
    done = train(loaded, tmp_path / "run", device="cpu", quiet=True)
    assert done["steps"] == 2 * 3 and done["last"]["cosine"] is not None
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [cache["samples"] for cache in info["caches"]] == [3, 4]
    assert [cache["path"] for cache in info["caches"]] == [str(first), str(second)]
    again = train(loaded, tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert again["resumed_from"] == 6


def test_a_distillation_without_validation_keeps_its_last_weights(tiny_cache: Path, tmp_path: Path) -> None:
    loaded = recipe(tiny_cache, **DISTILL, splits={"train": ["train", "val"], "val": None}, training__epochs=1)
    done = train(loaded, tmp_path / "run", device="cpu", quiet=True)
    assert done["last"] is done["best"] is None and not (tmp_path / "run" / "best.pt").exists()
    network_of(tmp_path / "run")


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_fine_tuning_takes_the_backbone_and_reads_no_cache_features(
    distilled: Path, tiny_cache: Path, tmp_path: Path, make_cache: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_cache(tmp_path / "bare", specs=())
    loaded = recipe(bare, **PLAIN, init=str(distilled), **steps_of(optimizer={"lr": 1e-12, "weight_decay": 0.0}))
    train(loaded, tmp_path / "run", device="cpu")
    shown = capsys.readouterr().err
    assert f"initialised from {distilled}/last.pt (task distill of fake-" in shown
    assert "left fresh" in shown and "head.weight, head.bias" in shown
    given, taken = (load_checkpoint(run / "last.pt")["model"] for run in (distilled, tmp_path / "run"))
    weights = [name for name in given if name.startswith("backbone.") and "running" not in name and "num_" not in name]
    assert len(weights) > 10 and all(torch.allclose(given[name], taken[name], atol=1e-6) for name in weights)
    assert taken["head.weight"].shape == (3, 8)
    init = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert init["task"] == "distill" and init["step"] == 12 and init["fresh"] == ["head.weight", "head.bias"]
    assert init["tensors"] == len([name for name in given if not name.startswith("head.")])


def test_layer_wise_learning_rates(distilled: Path, tiny_cache: Path, tmp_path: Path) -> None:
    groups = [{"pattern": "block", "lr_scale": 0.01}, {"pattern": "backbone", "lr_scale": 0.1}]
    loaded = recipe(tiny_cache, **PLAIN, init=str(distilled), **steps_of(optimizer={"lr": 0.5, "groups": groups}))
    with_rates = Trainer(loaded, tmp_path / "run", alone(), quiet=True)
    rate_of = {
        id(parameter): group["max_lr"] for group in with_rates.optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in with_rates.model.named_parameters():
        expected = 0.5 if name.startswith("head") else 0.005 if "block" in name else 0.05
        assert rate_of[id(parameter)] == pytest.approx(expected), name


def alone() -> Any:
    from ditr_train.distributed import Processes

    return Processes(0, 1, torch.device("cpu"))


def test_weights_of_another_network_are_refused(distilled: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            train(recipe(tiny_cache, **{**PLAIN, "init": str(distilled), **changes}), run, device="cpu", quiet=True)
        assert not run.exists()

    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 16, 16, 12], "layers": [1, 1, 1, 1]}
    refused(MismatchError, r"another backbone: .*\.channels is \[8, 16, 16, 8\] there and \[8, 16, 16, 12\]",
            model={"backbone": {**backbone, "norm_momentum": 0.1}})  # fmt: skip
    refused(
        MismatchError,
        r"other input channels: data\.feat is \['color', 'normal'\] there",
        data__feat=["normal", "color"],
    )
    refused(MismatchError, r"another frame: data\.center is true there and false in this recipe", data__center=False)
    refused(MismatchError, r"lacks \d+ tensors \(injection", vfm="fake", model__injection={})
    refused(MissingDataError, "RUN_DIR' is not a run folder; pass the run to start from", init="RUN_DIR")
    refused(MissingDataError, r"no other\.pt yet", init=str(distilled / "other.pt"))
    injected = tmp_path / "injected"
    train(recipe(tiny_cache, **steps_of()), injected, device="cpu", quiet=True)
    refused(MismatchError, r"has, beyond it, \d+ tensors \(injection", init=str(injected))


def test_fine_tuning_on_other_points_than_all_sources_is_told(
    tmp_path: Path, make_cache: Make, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [make_cache(tmp_path / name, train=2, val=1, points=200) for name in "ab"]
    near, far = ({"name": "PointClip", "args": {"low": [-x, -x, -9], "high": [x, x, 9]}} for x in (9, 30))
    sources = [{"cache": str(paths[0])}, {"cache": str(paths[1]), "at_test": [near]}]
    train(recipe(None, **DISTILL, sources=sources, **steps_of()), tmp_path / "joint", device="cpu", quiet=True)
    for at_test in ([], [near], [far]):
        loaded = recipe(paths[0], **PLAIN, init=str(tmp_path / "joint"), data__at_test=at_test, **steps_of())
        caplog.clear()
        train(loaded, tmp_path / f"run{len(list(tmp_path.iterdir()))}", device="cpu", quiet=True)
        told = re.search(r"data\.at_test \[\] or \[PointClip\(.*, this run has \[PointClip\(low=\(-30", caplog.text)
        assert (told is not None) == (at_test == [far])


# --- exactness ------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "inject": {"training__ema": 0.9, "training__accumulation": 2},
    "distill": {**DISTILL, "training__ema": 0.9, "training__accumulation": 2, "training__fixed_norms": 0.4},
    "finetune": {**PLAIN, "training__ema": 0.9, "training__accumulation": 2, "training__clip_grad": 1.0},
}


def test_splits_and_sources_that_are_not_there_name_their_keys(tiny_cache: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"splits": {"train": "train", "val": "test"}}, r"split .*'test'.*--set splits\.val=NAME, or splits\.val=null"),
        ({"cache": None, "sources": [{"cache": str(tiny_cache)}, {"cache": "NONE"}]}, r"sources\.1\.cache: '.*NONE'"),
        ({"cache": "NONE"}, r"^cache: '.*NONE'.*--set cache=PATH"),
    ):
        with pytest.raises((MissingDataError, UnknownNameError), match=message):
            train(recipe(tiny_cache, **{**DISTILL, **settings}), tmp_path / "run", device="cpu", quiet=True)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_uninterrupted(
    kind: str, distilled: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = {"init": str(distilled)} if kind == "finetune" else {}
    loaded = recipe(tiny_cache, **{**KINDS[kind], **init, "data__mix_prob": 0.0})
    train(loaded, tmp_path / "whole", device="cpu", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(TrainingInterruptedError, match="after step 4 of 6"):
            train(loaded, tmp_path / "run", device="cpu", quiet=True)
    done = train(loaded, tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert done["resumed_from"] == 4
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_two_processes_give_the_gradients_of_one(distilled: Path, tmp_path: Path, make_cache: Make) -> None:
    """One plain SGD step from the same weights: what changed is the gradient."""
    cache = make_cache(tmp_path / "c", points=400)
    settings = {
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        "schedule": {"name": "poly"}, "data__batch_size": 4, "data__mix_prob": 0.0,
    }  # fmt: skip
    changes = {"inject": {}, "distill": DISTILL, "finetune": {**PLAIN, "init": str(distilled)}}
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom ditr_train.recipe_files import read_recipe\n"
        "from ditr_train.trainer import train\n"
        "torch.distributed.init_process_group('gloo')\n"
        "for path in sys.argv[1:]:\n"
        "    train(read_recipe(Path(path)), Path(path).with_suffix(''), device='cpu', quiet=True)\n"
        # Together: where one leaves first, a thread of gloo may abort the other.
        "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
    )
    (tmp_path / "both.py").write_text(script)
    for kind, change in changes.items():
        one = recipe(cache, **steps_of(**settings, **change, training__accumulation=2))
        train(one, tmp_path / "one" / kind, device="cpu", quiet=True)
        (tmp_path / f"{kind}.yaml").write_text(recipe(cache, **steps_of(**settings, **change)).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "both.py"), *(str(tmp_path / f"{kind}.yaml") for kind in changes)]
    launcher = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = launcher.communicate(timeout=280)
    finally:
        with contextlib.suppress(ProcessLookupError):  # a test that fails leaves no process behind
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, errors
    for kind in changes:
        one, two = (load_checkpoint(run / "last.pt")["model"] for run in (tmp_path / "one" / kind, tmp_path / kind))
        moved = 0
        for name, value in one.items():
            if "running" in name or "num_batches" in name:  # of the last micro-batches, which differ
                continue
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")
            moved += 1
        assert moved > 10


# --- what is watched ------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_names_the_samples(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditr_train import tasks

    original, calls = tasks.segmentation_loss, []

    def failing(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:  # finite, but with a gradient that is not
            return original(logits, *args, **kwargs) + (logits.sum() * 0).sqrt().nan_to_num()
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(tasks, "segmentation_loss", failing)
    with pytest.raises(DivergedError, match=r"step 2: the gradient's norm is (nan|inf) on room0\d, room0\d;"):
        train(recipe(tiny_cache, data__mix_prob=0.0), tmp_path / "run", device="cpu", quiet=True)


def test_norms_keep_their_statistics_towards_the_end(tiny_cache: Path, tmp_path: Path) -> None:
    loaded = recipe(tiny_cache, **PLAIN, **{**steps_of(), "training__steps": 4, "training__fixed_norms": 0.5})
    trainer = Trainer(loaded, tmp_path / "run", alone(), quiet=True)
    norms = [module for module in trainer.model.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    for step, moving in enumerate((True, True, False, False)):
        trainer.step = step
        trainer._choose_statistics()
        assert trainer.model.training and len(norms) > 5 and {norm.training for norm in norms} == {moving}
    trainer.step = 0
    moved = trainer.model.state_dict()["backbone.stem.norm.running_mean"].clone()
    trainer.fit()
    after = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert after["backbone.stem.norm.num_batches_tracked"] == 2  # of 4 steps
    assert not torch.equal(after["backbone.stem.norm.running_mean"], moved)


def test_a_run_knows_its_paths_from_any_folder(
    distilled: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_cache.parent)
    init = os.path.relpath(distilled)
    loaded = recipe(Path(tiny_cache.name), **PLAIN, init=init, **steps_of())
    train(loaded, tmp_path / "run", device="cpu", quiet=True)
    monkeypatch.chdir(tmp_path)
    stored, _ = RunFolder(tmp_path / "run").open()
    assert stored.cache == str(tiny_cache) and stored.init == str(distilled)
    done = train(stored, tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert done["resumed_from"] == 1
    assert load_run(tmp_path / "run", device="cpu").dataset("val").ids == ["room04", "room05"]


def test_metrics_say_how_fast_and_how_large(distilled: Path) -> None:
    lines = [line for line in read_metrics(distilled / "metrics.jsonl") if line["kind"] == "train"]
    for line in lines:
        assert line["samples_per_second"] == pytest.approx(2 / line["seconds_per_step"])
        assert line["points_per_second"] > 100 * line["samples_per_second"] and line["memory_bytes"] > 1 << 20


def test_a_fraction_of_the_samples_is_part_of_a_larger_one(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", train=20, val=1, points=30, specs=())
    chosen = {
        fraction: set(Trainer(
            recipe(cache, **PLAIN, data__fraction=fraction, data__batch_size=1), tmp_path / str(fraction), alone(),
            quiet=True,
        ).task.first.ids)
        for fraction in (0.01, 0.05, 0.25, 1.0)
    }  # fmt: skip
    assert [len(ids) for ids in chosen.values()] == [1, 1, 5, 20]
    assert chosen[0.01] == chosen[0.05] < chosen[0.25] < chosen[1.0]


def test_a_segmenter_may_train_on_several_splits(tmp_path: Path, make_cache: Make) -> None:
    """As a fold of S3DIS does, whose areas are splits of one cache."""
    cache = make_cache(tmp_path / "c", train=3, val=2, points=60)
    both = recipe(cache, training__epochs=1, splits={"train": ["train", "val"], "val": "val"})
    train(both, tmp_path / "run", device="cpu", quiet=True)
    assert any("mIoU" in key for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in line)
    assert open_task(both, Processes(rank=0, world=1, device=torch.device("cpu"))).sizes == (5,)


# --- bad input, before any epoch ------------------------------------------------------------------------------------


def test_faults_are_found_before_the_start(
    tmp_path: Path, tiny_cache: Path, make_cache: Make, make_spec: MakeSpec
) -> None:
    run = tmp_path / "run"

    def refused(error: type[Exception], match: str, path: Path | None = tiny_cache, /, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            train(recipe(path, **changes), run, device="cpu", quiet=True)
        assert not run.exists()

    def cache(name: str, *specs: VFMSpec) -> Path:
        return make_cache(tmp_path / name, train=2, val=1, points=20, specs=specs)

    def joint(*caches: Path, **changes: Any) -> dict[str, Any]:
        return {**DISTILL, "sources": [{"cache": str(path)} for path in caches], **changes}

    refused(MismatchError, "for dataset 'scannet', but cache .* is of 'test'", dataset="scannet")
    refused(
        UnknownNameError, r"dinov2-large.* adds one; the recipe's is changed with --set vfm=NAME$", vfm="dinov2-large"
    )
    refused(UnknownNameError, "dinov2-large", **{**DISTILL, "vfm": "dinov2-large"})
    refused(UnknownNameError, "trian", splits={"train": "trian"})
    narrow, wide = cache("narrow", make_spec()), cache("wide", make_spec(dim=12))
    refused(MismatchError, r"dim of the VFM differs: 8 .* and 12 .*same --vfm", None, **joint(narrow, wide))
    other = cache("other", make_spec(weights_sha256="1" * 64))
    refused(MismatchError, "weights_sha256 of the VFM differs", None, **joint(narrow, other))
    half = cache("half", make_spec(codec="float16"))
    refused(MismatchError, "the codec differs: 'int8'", None, **joint(narrow, half))
    refused(UnknownNameError, r"--set sources\.1\.vfm=NAME$", None,
            **{**DISTILL, "sources": [{"cache": str(narrow)}, {"cache": str(narrow), "vfm": "none"}]})  # fmt: skip
    refused(UsageError, "cache and sources are both set", tiny_cache, **joint(narrow))
    refused(UsageError, "task is segment", None, sources=[{"cache": str(narrow)}])
    refused(UsageError, "task is distill but vfm is null", **{**DISTILL, "vfm": None})
    refused(UsageError, "cannot learn to predict them", task="distill")
    refused(UsageError, "given for some sources and not for others", None,
            **{**DISTILL, "sources": [{"cache": "a", "ratio": 1}, {"cache": "b"}]})  # fmt: skip
    refused(UsageError, r"sources\.0\.ratio: so small", None, **{
        **DISTILL, "sources": [{"cache": str(narrow), "ratio": 1e-6}, {"cache": str(narrow), "ratio": 1}]
    })  # fmt: skip
    refused(UsageError, "splits.val is null, but task segment is evaluated", splits={"val": None})
    refused(UnknownNameError, "'val': known: train", make_cache(tmp_path / "e", train=2, val=0, points=20))


def test_a_changed_cache_is_not_resumed(tmp_path: Path, make_cache: Make) -> None:
    cache = make_cache(tmp_path / "c", points=60)
    train(recipe(cache, training__epochs=1), tmp_path / "run", device="cpu", quiet=True)
    other = make_cache(tmp_path / "d", points=60, seed=5)
    with pytest.raises(MismatchError, match=r"training samples of cache .* not those that the run began with \(4 then"):
        train(recipe(other, training__epochs=1), tmp_path / "run", device="cpu", resume=True, quiet=True)
