from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditr_cache.errors import MismatchError, MissingDataError, UsageError
from ditr_cache.schema import VFMSpec
from ditr_train import tasks
from ditr_train.checkpoint import load_checkpoint
from ditr_train.distributed import Processes, choose_device
from ditr_train.evaluate import evaluate
from ditr_train.tracking import read_metrics
from ditr_train.trainer import DivergedError, TrainingInterruptedError, _check_mixing, train
from runs import ONE_THREAD, assert_same_run, recipe, stop_at


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted: 6 steps, 3 epochs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe(tiny_cache), run, device="cpu", quiet=True)
    return run


def test_a_run_folder_holds_everything(whole: Path, tiny_cache: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        "recipe.yaml", "run.json", "last.pt", "best.pt", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    info = json.loads((whole / "run.json").read_text())
    (cache,) = info["caches"]
    assert cache["path"] == str(tiny_cache.resolve()) and cache["samples"] == 4 and len(cache["identity"]) == 64
    assert info["class_colors"] == [[0, 90, 200], [40, 90, 200], [80, 90, 200]] and info["init"] is None
    assert info["vfm"]["name"] == "fake"
    assert info["class_names"] == ["floor", "wall", "picture"] and set(info["versions"]) >= {"ditr", "torch", "python"}
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6]
    assert [line["step"] for line in lines if line["kind"] == "val"] == [2, 4, 6]
    assert all({"loss", "lr", "data_wait", "epoch"} <= set(line) for line in lines if line["kind"] == "train")
    best = load_checkpoint(whole / "best.pt")
    assert best["results"]["mIoU"] == max(line["mIoU"] for line in lines if line["kind"] == "val")


def test_the_same_recipe_gives_the_same_weights(whole: Path, tiny_cache: Path, tmp_path: Path) -> None:
    train(recipe(tiny_cache, data__workers=2), tmp_path / "again", device="cpu", quiet=True)
    assert_same_run(whole, tmp_path / "again")


@pytest.mark.parametrize("step", [0, 2, 3])
def test_interrupted_and_resumed_equals_uninterrupted(
    whole: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(TrainingInterruptedError, match=rf"SIGTERM after step {step + 1} of 6.*--resume"):
            train(recipe(tiny_cache), tmp_path / "run", device="cpu", quiet=True)
    torch.manual_seed(1234)  # nothing may hang on the state that the process happens to be in
    done = train(recipe(tiny_cache), tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert done["resumed_from"] == step + 1 and done["steps"] == 6
    assert_same_run(whole, tmp_path / "run")


def test_micro_batches_set_the_accumulation(tiny_cache: Path, tmp_path: Path) -> None:
    settings = {"data__mix_prob": 0.0, "data__batch_size": 4}
    train(recipe(tiny_cache, **settings, data__micro_batch=1), tmp_path / "micro", device="cpu", quiet=True)
    train(recipe(tiny_cache, **settings, training__accumulation=4), tmp_path / "run", device="cpu", quiet=True)
    assert_same_run(tmp_path / "micro", tmp_path / "run")


def test_micro_batches_that_cannot_be_mixed_are_told(
    tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"data__mix_prob": 0.8, "data__batch_size": 4, "training__epochs": 1}
    with pytest.raises(UsageError, match=r"data\.mix_prob: 0\.8 of the pairs .* a single sample"):
        train(recipe(tiny_cache, **settings, data__micro_batch=1), tmp_path / "one", device="cpu", quiet=True)
    assert not (tmp_path / "one").exists()
    train(recipe(tiny_cache, **settings, data__micro_batch=3), tmp_path / "two", device="cpu", quiet=True)
    assert "neighbour" not in caplog.text  # two micro-batches of two
    settings["data__batch_size"] = 3
    train(recipe(tiny_cache, **settings), tmp_path / "whole", device="cpu", quiet=True)
    assert "neighbour" not in caplog.text  # no other choice of micro-batches
    _check_mixing(0.8, 12, 3)
    assert "of every 3 samples one has no neighbour" in caplog.text


def test_resume_with_accumulation(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"training__accumulation": 2, "data__mix_prob": 0.0, "training__clip_grad": 1.0}
    train(recipe(tiny_cache, **settings), tmp_path / "whole", device="cpu", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGINT)
        with pytest.raises(TrainingInterruptedError, match="SIGINT"):
            train(recipe(tiny_cache, **settings), tmp_path / "run", device="cpu", quiet=True)
    train(recipe(tiny_cache, **settings), tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_killed_and_resumed_equals_uninterrupted(whole: Path, tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe(tiny_cache).to_yaml())
    script = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from ditr_train.recipe_files import read_recipe\n"
        "from ditr_train.trainer import Trainer, train\n"
        "step = Trainer._train_step\n"
        "def stepping(self, batches):\n"
        "    done = step(self, batches)\n"
        "    if self.step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done\n"
        "Trainer._train_step = stepping\n"
        "train(read_recipe(Path(sys.argv[1])), sys.argv[2], device='cpu', quiet=True)\n"
    )
    run = tmp_path / "run"
    args = [sys.executable, "-c", script, str(tmp_path / "recipe.yaml"), str(run)]
    assert subprocess.run(args, env=ONE_THREAD, check=False).returncode == -signal.SIGKILL
    done = train(recipe(tiny_cache), run, device="cpu", resume=True, quiet=True)
    assert done["resumed_from"] == 2  # the end of the first epoch
    assert_same_run(whole, run)


def test_signal_from_outside_ends_the_process_cleanly(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe(tiny_cache, training__epochs=5000, data__workers=1).to_yaml())
    run = tmp_path / "run"
    args = [sys.executable, "-m", "ditr_train.cli", "run", str(tmp_path / "recipe.yaml"), "--out", str(run)]
    process = subprocess.Popen(args, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (run / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the loading processes get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "interrupted by SIGINT" in errors and "--resume" in errors


def test_a_finished_run_is_left_alone(whole: Path, tiny_cache: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "last.pt").read_bytes()
    done = train(recipe(tiny_cache, data__workers=1), whole, device="cpu", resume=True, quiet=True)
    assert done["steps"] == done["resumed_from"] == 6 and done["last"]["mIoU"] is not None
    assert ((whole / "metrics.jsonl").read_bytes(), (whole / "last.pt").read_bytes()) == before


def test_an_existing_folder_is_not_overwritten(whole: Path, tiny_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"exists already.*--resume"):
        train(recipe(tiny_cache), whole, device="cpu", quiet=True)


def test_resume_refuses_another_recipe_or_cache(
    whole: Path, tiny_cache: Path, tmp_path: Path, make_cache: Callable[..., Path], make_spec: Callable[..., VFMSpec]
) -> None:
    with pytest.raises(MismatchError, match=r"another recipe: data\.grid_size, seed differ"):
        train(recipe(tiny_cache, seed=1, data__grid_size=0.2), whole, device="cpu", resume=True, quiet=True)
    other = make_cache(tmp_path / "c", points=50, specs=(make_spec(weights_sha256="1" * 64),))
    with pytest.raises(MismatchError, match="weights_sha256 differs"):
        train(recipe(other), whole, device="cpu", resume=True, quiet=True)


def test_resume_without_a_run_starts_one(tiny_cache: Path, tmp_path: Path) -> None:
    settings = {"training__epochs": None, "training__steps": 1, "vfm": None, "model__injection": None}
    done = train(recipe(tiny_cache, **settings), tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert done["steps"] == 1 and done["resumed_from"] == 0 and done["last"]["step"] == 1


def test_faults_are_found_before_the_start(tiny_cache: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="--set cache=PATH"):
        train(recipe(tiny_cache, cache=None), run, quiet=True)
    with pytest.raises(MissingDataError, match="not a cache"):
        train(recipe(tmp_path / "none"), run, quiet=True)
    with pytest.raises(UsageError, match=r"loss\.class_weights.*\(3\), got 2"):
        train(recipe(tiny_cache, loss={"class_weights": [1, 2]}), run, quiet=True)
    with pytest.raises(MismatchError, match=r"classes differ.*--set classes=null"):
        train(recipe(tiny_cache, classes=["a", "b", "c"]), run, quiet=True)
    partly = make_cache(tmp_path / "c", points=50, featureless=("room05",))
    with pytest.raises(MissingDataError, match="'val': 1 of 2 samples"):
        train(recipe(partly), run, quiet=True)
    assert not run.exists()


def test_a_loss_that_is_not_finite_names_step_and_samples(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tasks.segmentation_loss
    calls: list[int] = []

    def failing(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(logits, *args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(tasks, "segmentation_loss", failing)
    with pytest.raises(DivergedError, match=r"step 3: the loss is nan on room0\d"):
        train(recipe(tiny_cache), tmp_path / "run", device="cpu", quiet=True)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 2 and all(torch.isfinite(w).all() for w in state["model"].values())


def test_injection_learns_what_points_cannot_tell(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    cache = make_cache(tmp_path / "c", train=4, val=1, points=800)
    iou = {}
    for name, changes in (("plain", {"vfm": None, "model__injection": None}), ("inject", {"model__injection": {}})):
        settings = {"training__epochs": 10, "training__evaluate_every": 10, "data__mix_prob": 0.0, **changes}
        done = train(recipe(cache, **settings), tmp_path / name, device="cpu", quiet=True)
        iou[name] = done["last"]["IoU"]["picture"]
    assert iou["inject"] > iou["plain"] + 0.1


def test_two_processes_train_as_one(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe(tiny_cache, data__mix_prob=0.0).to_yaml())
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", "ditr_train.cli", "run", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    ranks = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "run")],
            env={
                **ONE_THREAD, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    val = [line for line in lines if line["kind"] == "val"]
    assert [line["step"] for line in val] == [2, 4, 6]
    assert np.isfinite([line["loss"] for line in lines if line["kind"] == "train"]).all()
    # The second process scored its share with the weights that are saved, running statistics included.
    alone = evaluate(tmp_path / "run", device="cpu", checkpoint="last")
    assert {name: alone[name] for name in ("mIoU", "IoU")} == {name: val[-1][name] for name in ("mIoU", "IoU")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_a_gpu_trains(tiny_cache: Path, tmp_path: Path, amp: str) -> None:
    done = train(recipe(tiny_cache, training__amp=amp, data__workers=1), tmp_path / "run", device="cuda", quiet=True)
    assert done["steps"] == 6 and done["last"]["mIoU"] is not None


def test_processes_alone() -> None:
    alone = Processes(0, 1, choose_device("cpu"))
    assert alone.any(True) and not alone.any(False) and alone.is_main
    alone.barrier()
