from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditr_train.cli import default_out, main

RECIPE = """
description: tiny
vfm: fake
data: {grid_size: 0.1, feat: [color], batch_size: 2, workers: 0}
model:
  backbone: {stem_channels: 8, stem_kernel_size: 3, channels: [8, 8], layers: [1, 1]}
  injection: {}
training: {epochs: 1}
"""


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(args))
    return int(done.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return str(tmp_path / "tiny.yaml")


def test_run_then_eval(
    recipe: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    set_cache = ("--set", f"cache={tiny_cache}")
    assert call("run", "tiny.yaml", *set_cache, "--device", "cpu") == 0
    folder = "runs/tiny-fake-0"
    out = capsys.readouterr().out
    assert folder in out and "mIoU" in out and "data wait" in out and (tmp_path / folder / "best.pt").exists()

    assert call("run", "tiny.yaml", *set_cache, "--device", "cpu") == 2
    assert "--resume" in capsys.readouterr().err
    assert call("run", "tiny.yaml", *set_cache, "--device", "cpu", "--resume") == 0
    capsys.readouterr()

    assert call("eval", folder, "--json", "--device", "cpu") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert set(results) >= {"run", "split", "samples", "mIoU", "mAcc", "allAcc", "IoU", "seconds"}
    assert captured.err == "" and set(results["IoU"]) == {"floor", "wall", "picture"}

    assert call("eval", folder, "--split", "train", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "picture" in out and "train of" in out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert {"demo/inject", "demo/plain", "scannet/inject", "scannet/plain"} <= {line.split()[0] for line in lines}
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "demo/injct", "--set", "cache=x"], "did you mean 'demo/inject'"),
        (["run", "demo/plain"], "--set cache=PATH"),
        (["run", "demo/plain", "--set", "cache=/no/where"], "is not a cache"),
        (["run", "demo/plain", "--set", "cach=x"], "did you mean 'cache'"),
        (["run", "demo/plain", "--set", "cache=x", "--device", "tpu"], "expected auto, cpu or cuda, got 'tpu'"),
        (["eval", "/no/where"], "is not a run folder"),
        (["eval"], "Missing argument"),
        (["rum"], "No such command"),
        (["run", "demo/plain", "--bogus"], "No such option"),
    ],
)
def test_wrong_use_is_one_message_and_exit_2(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_absent(recipe: str, tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", recipe, "--set", f"cache={tiny_cache}", "--device", "cuda") == 2
    assert "error: device: cuda was asked for" in capsys.readouterr().err


def test_damaged_cache_is_reported_with_its_file(
    recipe: str, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    for path in (cache / "geometry" / "room00.zarr" / "coord" / "c").rglob("*"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(bytes(content))
    assert call("run", recipe, "--set", f"cache={cache}", "--set", "data.workers=1", "--out", str(tmp_path / "r")) == 1
    errors = capsys.readouterr().err
    assert "error: " in errors and "room00.zarr/coord" in errors and "Traceback" not in errors


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from ditr_train.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "KEY=VALUE" in done.stdout


def test_default_run_folder() -> None:
    assert default_out("demo/inject", "efficientnet-lite0", 3) == "runs/demo-inject-efficientnet-lite0-3"
    assert default_out("../mine.yaml", None, 0) == "runs/mine-none-0"
