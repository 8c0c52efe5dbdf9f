"""Every command and every line of Python that the README gives, run on a small generated dataset; and the commands of
docs/datasets/posed.md, which ask more of the recipe than those of other datasets."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.torchvision_compat import declare_missing_operators
from ditr_train.foreign.networks import public_network
from ditr_train.foreign.weights import give
from ditr_train.models.build import build_segmentor
from ditr_train.recipe_files import load_recipe
from layouts import nuscenes, posed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL_RUN = "--set training.epochs=1 --set data.batch_size=2 --set data.workers=0 --set data.grid_size=0.2 "
SMALL_UNET = (
    "--set model.backbone.channels=[8,8,8,8,8,8,8,8] --set model.backbone.layers=[1,1,1,1,1,1,1,1] "
    "--set model.backbone.stem_channels=8 --set model.backbone.stem_kernel_size=5"
)
SMALL_PTV3 = "--set model.backbone.patch_size=32 " + " ".join(
    f"--set model.backbone.{branch}_{what}=[{','.join([value] * stages)}]"
    for branch, stages in (("encoder", 5), ("decoder", 4))
    for what, value in (("depths", "1"), ("channels", "8"), ("heads", "2"))
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(torchrun [^`]*)`", README.replace("\n", " "))
    return [line for line in lines if line] + inline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the README names: /data/scannet, /data/nuscenes, /data/capture, the weights of its VFMs."""
    folder = tmp_path_factory.mktemp("readme")
    nuscenes.write(folder / "nuscenes")
    small = RoomsSettings(
        frames=3, color_size=(64, 48), depth_size=(64, 48), point_spacing=0.2, lost_pose_probability=0
    )
    synthesize(folder / "scannet", scenes=3, settings=small)
    scene = folder / "scannet" / "scans" / "scene0000_00"
    capture = folder / "capture"
    capture.mkdir()
    for i in range(3):
        shutil.copy(scene / "color" / f"{i}.jpg", capture / f"frame-{i:06d}.color.jpg")
        shutil.copy(scene / "depth" / f"{i}.png", capture / f"frame-{i:06d}.depth.png")
        shutil.copy(scene / "pose" / f"{i}.txt", capture / f"frame-{i:06d}.pose.txt")
    intrinsics = np.loadtxt(scene / "intrinsic" / "intrinsic_color.txt")[:3, :3]
    np.savetxt(capture / "camera-intrinsics.txt", intrinsics)
    declare_missing_operators()
    import timm
    import torch

    for name in ("test_vit", "test_efficientnet"):
        torch.save(timm.create_model(name, num_classes=0).state_dict(), folder / f"{name}.pt")
    sonata = load_recipe("scannet/finetune-sonata", shlex.split(SMALL_PTV3.replace("--set ", "")))
    network = build_segmentor(sonata.model, in_channels=9, num_classes=20)
    public = public_network(sonata.model.backbone)
    torch.save({"state_dict": give(network.state_dict(), public, head=False)}, folder / "sonata.pth")
    return folder


def stand_in(command: str, place: Path) -> list[str]:
    """The command on the small data: paths, weights and sizes replaced, everything else as the README has it."""
    extracts = command.startswith("ditr-cache extract")
    for name, model in (("dinov2-large", "test_vit"), ("dinov3-large", "test_efficientnet")):
        weights = f" --checkpoint {place / model}.pt --image-size 48x64" if extracts else ""
        command = re.sub(rf"(--vfm(-[ab])?) {name}", rf"\1 {model}{weights}", command)
    command = command.replace("--vfm efficientnet-lite0", "--vfm efficientnet-lite0 --image-size 48x64")
    for text, there in (("/data/", ""), ("runs/", "runs/"), ("room.png", "r.png"), ("overlay.png", "o.png")):
        command = command.replace(text, f"{place}/{there}")
    if extracts:
        command += " --workers 0"
    if command.startswith(("ditr-train run", "ditr-train sweep")):
        reads_features = re.search("scannet/(inject|distill)", command) is not None
        network = SMALL_PTV3 if re.search("ptv3|sonata", command) else SMALL_UNET
        command += f" {SMALL_RUN} {network}" + (" --set vfm=test_vit" if reads_features else "")
    if command.startswith("ditr-train probe"):
        command += " --vfm test_vit"
    command = command.replace(" -o labels", f" -o {place}/labels").replace("--seeds 2", "--seeds 1")
    return shlex.split(command)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ditr_cache.cli import main as cache
    from ditr_train.cli import main as train

    monkeypatch.setattr(sys, "argv", arguments)
    try:
        {"ditr-cache": cache, "ditr-train": train}[arguments[0]]()
    except SystemExit as stop:
        assert not stop.code, arguments


def test_commands_and_python_run_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for command in commands():
        if command.split()[0] in ("ditr-cache", "ditr-train"):
            run(stand_in(command, place), monkeypatch)
            ran.append(command)
    assert len(ran) >= 11
    with Image.open(place / "r.png") as picture:
        assert picture.size[0] > 400
    (python,) = blocks("python")
    names: dict[str, type] = {}
    exec(python, names)
    item = names["Points"](place / "cache", "train", vfm="test_vit")[0]
    assert len(item["coord"]) == len(item["feature"]) == len(item["valid"]) and item["valid"].any()


@pytest.mark.parametrize(("points", "options"), [("ply", ""), ("las", " --option normals=estimate")])
def test_the_commands_of_the_page_on_own_captures(
    points: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud in LAS has no normals, which the recipe reads."""
    posed.write(tmp_path / "captures", points=points, depth=True, names=("a", "b", "c", "d"), count=500)
    declare_missing_operators()
    import timm
    import torch

    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "test_vit.pt")
    page = (ROOT / "docs/datasets/posed.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for command in block.splitlines():
        run(stand_in(command + options * (" extract " in command), tmp_path), monkeypatch)
    assert (tmp_path / "runs/own/best.pt").exists()


def test_make_targets_and_extras_exist() -> None:
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for target in re.findall(r"`?make ([a-z ]+)", README):
        for name in target.split():
            if name in ("demo", "test", "lint", "bench"):
                assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name
    for extras in re.findall(r"ditr\[([a-z0-9,]+)\]", README):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_every_other_command_is_known() -> None:
    """Nothing in the README is silently left out by the tests above."""
    programs = {c.split()[0] for c in commands()}
    assert programs == {"ditr-cache", "ditr-train", "make", "pip", "torchrun"}


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
