"""Public weights: what our networks compute with them, and which files are refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError, MissingDataError, UsageError
from ditr_train.foreign.files import read_public_file
from ditr_train.foreign.networks import public_network
from ditr_train.foreign.pairs import Pair
from ditr_train.initialise import Initialised, initialise
from ditr_train.models.build import build_backbone, build_segmentor
from ditr_train.models.segmentor import Segmentor
from ditr_train.models.sparse_conv import SubMConv3d, sparse_tensor
from ditr_train.recipe import Recipe
from ditr_train.trainer import train
from pointcept_reference import batch, networks, output, state_dict
from runs import PLAIN, recipe

NETWORKS = networks()
PREFIXES = {
    "SpUNet-v1m1": "module.backbone.",
    "PT-v3m1": "backbone.",
    "PT-v3m1 of v1.5.1": "module.",
    "PT-v3m2": "module.student.backbone.",
    "Sonata": "",
}
WRAPPERS = {"PT-v3m1": "model", "Sonata": None}


def recipe_for(name: str, file: Path | str, /, **changes: Any) -> Recipe:
    given = {"init": str(file), "init_format": "pointcept", "model__backbone": NETWORKS[name]["backbone"]}
    return recipe(None, **{**PLAIN, **given, **changes})


def network_for(of: Recipe, in_channels: int = 6, classes: int = 5) -> Segmentor:
    torch.manual_seed(0)
    return build_segmentor(of.model, in_channels=in_channels, num_classes=classes, feature_dim=4).eval()


def saved(path: Path, tensors: Mapping[str, Tensor], wrapper: str | None = "state_dict", **beside: Any) -> Path:
    torch.save({wrapper: dict(tensors), **beside} if wrapper else dict(tensors), path)
    return path


def started(name: str, file: Path, /, **changes: Any) -> tuple[Segmentor, Initialised]:
    of = recipe_for(name, file, **changes)
    model = network_for(of)
    return model, initialise(model, str(file), of)


# --- the same network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_outputs_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    heads = {"seg_head.weight": torch.ones(20, 8), "seg_head.bias": torch.ones(20)} if name != "Sonata" else {}
    state = {**state_dict(name, PREFIXES[name]), **{f"module.{n}": v for n, v in heads.items()}}
    model, done = started(name, saved(tmp_path / "public.pth", state, WRAPPERS.get(name, "state_dict")))
    points, expected = batch(), output(name)
    if name == "SpUNet-v1m1":  # of which the file holds class scores
        head = {p.ours: p.to_ours(state_dict(name, "backbone.")[p.theirs]) for p in public_network_of(name).head}
        model.load_state_dict(head, strict=False)
        scores = model(points)
    else:
        scores = model.point_features(points)
    torch.testing.assert_close(scores.detach(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    assert done.fresh == ("head.weight", "head.bias") and done.network == public_network_of(name).name
    assert done.tensors == len(model.backbone.state_dict()) and done.format == "pointcept"


def public_network_of(name: str) -> Any:
    return public_network(recipe_for(name, "").model.backbone)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_list_has_every_tensor_of_both_once(name: str) -> None:
    config = recipe_for(name, "").model.backbone
    pairs = public_network(config).pairs
    ours, theirs = [pair.ours for pair in pairs], [pair.theirs for pair in pairs]
    assert sorted(ours) == sorted(build_backbone(config, 6).state_dict())
    beyond = {"SpUNet-v1m1": ["final.bias", "final.weight"], "PT-v3m2": ["embedding.mask_token"]}.get(name, [])
    assert sorted([*theirs, *beyond]) == sorted(NETWORKS[name]["tensors"])


NARROW = {
    "name": "ptv3", "encoder_channels": [8] * 5, "encoder_heads": [1] * 5, "decoder_channels": [8] * 4,
    "decoder_heads": [1] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "backbone",
    [
        {"channels": [8] * 8, "stem_channels": 8},
        NARROW,
        {**NARROW, "rpe": True, "patch_size": 128},
        {**NARROW, "variant": "sonata", "decoder_depths": [1, 2, 3, 1]},
    ],
    ids=["spunet", "ptv3", "rpe", "sonata"],
)
def test_published_depths_are_covered_too(backbone: dict[str, Any]) -> None:
    config = recipe(None, **{**PLAIN, "model__backbone": backbone}).model.backbone
    ours = build_backbone(config, 6).state_dict()
    assert sorted(pair.ours for pair in public_network(config).pairs) == sorted(ours)


def test_a_convolution_of_one_voxel_is_stored_transposed() -> None:
    """spconv reads the weight [out, 1, 1, 1, in] as [in, out], whatever its shape says."""
    conv = SubMConv3d(3, 5, 1, bias=False)
    feat, grid = torch.randn(4, 3), torch.arange(12).reshape(4, 3).int()
    said = conv(sparse_tensor(feat, grid, torch.zeros(4).long(), 1, 0)).features
    pair = Pair("a", "b", pointwise=True)
    ours = pair.to_ours(conv.weight)
    torch.testing.assert_close(said, F.linear(feat, ours))
    assert torch.equal(pair.to_theirs(ours), conv.weight) and pair.their_shape(ours.shape) == conv.weight.shape


def test_weights_of_spconv_2_1_are_turned(tmp_path: Path) -> None:
    """Its kernels of more than 32 voxels are stored [x, y, z, out, in]."""
    state = state_dict("SpUNet-v1m1")
    new, _ = started("SpUNet-v1m1", saved(tmp_path / "new.pth", state))
    state["conv_input.0.weight"] = state["conv_input.0.weight"].permute(1, 2, 3, 0, 4).contiguous()
    old, _ = started("SpUNet-v1m1", saved(tmp_path / "old.pth", state))
    assert all(torch.equal(a, b) for a, b in zip(new.backbone.parameters(), old.backbone.parameters(), strict=True))


# --- what stays fresh -----------------------------------------------------------------------------------------------


def test_an_encoder_leaves_the_decoder_fresh(tmp_path: Path) -> None:
    file = saved(tmp_path / "sonata.pth", state_dict("Sonata"), "state_dict", config={"in_channels": 6, "order": ["z"]})
    model, done = started("PT-v3m2", file)
    before = network_for(recipe_for("PT-v3m2", file)).state_dict()
    decoder = ("backbone.up.", "backbone.decoder.", "head.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(decoder) or value.numel() == 0, name
    parameters = [name for name, _ in model.named_parameters()]
    assert list(done.fresh) == [name for name in parameters if name.startswith(decoder)]
    assert "backbone.decoder.* (" in str(done) and "head.weight, head.bias left fresh" in str(done)


def test_counters_of_norms_may_be_left_out(tmp_path: Path) -> None:
    tensors = {name: value for name, value in state_dict("PT-v3m1").items() if "num_batches_tracked" not in name}
    assert len(tensors) < len(state_dict("PT-v3m1"))
    _, done = started("PT-v3m1", saved(tmp_path / "public.pth", tensors))
    assert list(done.fresh) == ["head.weight", "head.bias"]


def test_an_encoder_alone_takes_nothing_of_a_decoder(tmp_path: Path) -> None:
    file = saved(tmp_path / "public.pth", state_dict("PT-v3m1"))
    alone = {"decoder_depths": [], "decoder_channels": [], "decoder_heads": []}
    backbone = json.loads(json.dumps(dataclasses.asdict(recipe_for("PT-v3m1", file).model.backbone))) | alone
    model, done = started("PT-v3m1", file, model__backbone=backbone)
    assert list(done.fresh) == ["head.weight", "head.bias"] and not list(model.backbone.decoder)


def test_injection_stays_fresh(tmp_path: Path) -> None:
    file = saved(tmp_path / "public.pth", state_dict("SpUNet-v1m1"))
    plain, _ = started("SpUNet-v1m1", file)
    model, done = started("SpUNet-v1m1", file, vfm="fake", model__injection={})
    assert all(torch.equal(a, b) for a, b in zip(plain.backbone.parameters(), model.backbone.parameters(), strict=True))
    assert {name.split(".")[0] for name in done.fresh} == {"injection", "head"} and "injection.* (" in str(done)
    with pytest.raises(MismatchError, match=r"points of 6 channels, this recipe gives them 38.*injection\.input"):
        started("SpUNet-v1m1", file, vfm="fake", model__injection={"input": True})


def test_the_student_of_a_self_distillation_is_taken(tmp_path: Path) -> None:
    student = state_dict("Sonata", "student.backbone.")
    teacher = {f"teacher.backbone.{n}": v + 1 for n, v in state_dict("Sonata").items()}
    file = saved(tmp_path / "pretrained.pth", {**teacher, **student, "student.mask_head.weight": torch.ones(2)})
    model, _ = started("Sonata", file)
    alone, _ = started("Sonata", saved(tmp_path / "alone.pth", state_dict("Sonata")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_run_starts_from_a_file_and_says_so(
    tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(
        tmp_path / "public.pth", state_dict("PT-v3m1", "backbone."), best_metric_value=np.float64(0.7), epoch=3
    )
    of = recipe_for(
        "PT-v3m1", file, cache=str(tiny_cache), training__epochs=None, training__steps=1,
        optimizer={"lr": 1e-12, "weight_decay": 0.0},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(of, tmp_path / "run", device="cpu")
    assert "colours in -1 to 1 if they are from before Pointcept v1.6.0, this run gives them 0 to 1" in caplog.text
    assert f"initialised from {file} (PT-v3m1): " in capsys.readouterr().err
    init = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert init["format"] == "pointcept" and init["network"] == "PT-v3m1" and init["task"] is None
    assert init["sha256"] == read_public_file(file).sha256 and len(init["sha256"]) == 64
    assert train(of, tmp_path / "run", device="cpu", resume=True, quiet=True)["resumed_from"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"data__at_test": [{"name": "ChromaticNormalize", "args": {"mean": [0.5] * 3, "std": [0.5] * 3}}]},
        {"data__feat": ["normal", "coord"]},
    ],
    ids=["signed", "colourless"],
)
def test_no_word_about_colours_where_they_are_settled(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path / "public.pth", state_dict("PT-v3m1"))
    started("PT-v3m1 of v1.5.1", file, **changes)
    assert not caplog.records
    started("PT-v3m1 of v1.5.1", file)
    assert "want colours in -1 to 1, this run gives them 0 to 1" in caplog.text
    caplog.clear()
    started("Sonata", saved(tmp_path / "sonata.pth", state_dict("Sonata")))  # always of 0..1
    assert not caplog.records


# --- files ----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_read_and_objects_are_not(tmp_path: Path) -> None:
    state = state_dict("Sonata")
    scalars: dict[str, Any] = {"a": np.float64(1), "b": np.float32(1), "c": np.int64(1), "d": np.bool_(True)}
    file = saved(tmp_path / "scalars.pth", state, **scalars)
    assert set(read_public_file(file).tensors) == set(state)
    # As numpy before 2 names them.
    old = saved(tmp_path / "old.pth", state, **scalars).read_bytes()
    assert b"numpy._core.multiarray\n" in old
    rewritten(tmp_path / "old.pth", b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert set(read_public_file(tmp_path / "old.pth").tensors) == set(state)

    marker = tmp_path / "ran"
    file = saved(tmp_path / "objects.pth", state, scheduler=Runs(str(marker)))
    with pytest.raises(DataError, match=r"objects besides tensors, numbers and text.*keep the weights alone"):
        read_public_file(file)
    assert not marker.exists()


class Runs:
    """What a file may hold that does something when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def rewritten(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the part of a torch file that names things."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state_dict("SpUNet-v1m1", "backbone."), tmp_path / "public.safetensors")
    model, _ = started("SpUNet-v1m1", tmp_path / "public.safetensors")
    same, _ = started("SpUNet-v1m1", saved(tmp_path / "public.pth", state_dict("SpUNet-v1m1")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "public.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="cut or damaged"):
        read_public_file(tmp_path / "cut.safetensors")


def test_safetensors_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "public.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        read_public_file(tmp_path / "public.safetensors")


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"none\.pth' does not exist"):
        read_public_file(tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"is a folder.*init_format=run"):
        read_public_file(tmp_path)
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(DataError, match="cut, damaged or of another kind"):
        read_public_file(tmp_path / "text.pth")
    torch.save({"epoch": 1, "names": ["a"]}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"expected a state dict.*got the keys 'epoch', 'names'"):
        read_public_file(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="got a list"):
        read_public_file(tmp_path / "list.pth")
    torch.save({"format_version": 1, "model": {"backbone.x": torch.ones(1)}}, tmp_path / "ours.pt")
    with pytest.raises(UsageError, match=r"checkpoint of ditr-train.*init_format=run"):
        read_public_file(tmp_path / "ours.pt")


def test_files_of_another_network_are_refused(tmp_path: Path) -> None:
    unet = state_dict("SpUNet-v1m1", "backbone.")

    def refused(match: str, name: str, tensors: Mapping[str, Tensor], **changes: Any) -> None:
        file = saved(tmp_path / "public.pth", tensors)
        before = network_for(of := recipe_for(name, file, **changes))
        kept = {key: value.clone() for key, value in before.state_dict().items()}
        with pytest.raises(MismatchError, match=match):
            initialise(before, str(file), of)
        assert all(torch.equal(value, kept[key]) for key, value in before.state_dict().items())

    refused(r"holds a SpUNet-v1m1, this recipe's network is a PT-v3m1; set model\.backbone\.name=sparse_unet",
            "PT-v3m1", unet)  # fmt: skip
    refused(r"holds a PT-v3m2 \(Sonata\).*variant=sonata", "PT-v3m1", state_dict("Sonata"))
    refused(r"holds no SpUNet-v1m1: expected one tensor whose name ends in 'conv_input\.0\.weight', got 1 .*\(x\)",
            "SpUNet-v1m1", {"x": torch.ones(1)})  # fmt: skip
    lacking = {name: value for name, value in unet.items() if ".enc.1.block1." not in name}
    refused(r"it lacks 10 tensors \(backbone\.enc\.1\.block1\.bn1\.bias, .*depths of model\.backbone",
            "SpUNet-v1m1", lacking)  # fmt: skip
    no_up = {name: value for name, value in unet.items() if ".up." not in name}
    refused(r"it lacks 10 tensors \(backbone\.up\.0", "SpUNet-v1m1", no_up)
    refused(r"has, beyond those, 1 tensors \(backbone\.enc\.9\.x\)", "SpUNet-v1m1",
            {**unet, "backbone.enc.9.x": torch.ones(1)})  # fmt: skip
    wide = {**unet, "backbone.conv_input.0.weight": torch.ones(8, 5, 5, 5, 9)}
    refused(r"has shape \[8, 5, 5, 5, 9\].*points of 9 channels, this recipe gives them 6: set data\.feat",
            "SpUNet-v1m1", wide)  # fmt: skip
    proj = {**unet, "backbone.dec.0.block0.proj.0.weight": torch.ones(8, 1, 1, 1, 17)}
    refused(r"dec\.0\.block0\.proj\.0\.weight has shape \[8, 1, 1, 1, 17\] there, \[8, 1, 1, 1, 16\] was expected",
            "SpUNet-v1m1", proj)  # fmt: skip
    odd = {**NETWORKS["SpUNet-v1m1"]["backbone"], "norm_eps": 1e-5}
    refused(r"for model\.backbone\.norm_eps=0\.001, this recipe has 1e-05", "SpUNet-v1m1", unet, model__backbone=odd)


def test_a_backbone_that_pointcept_has_not_is_refused() -> None:
    of = recipe(None, **PLAIN, model__backbone={"name": "pointnext"}, init="x", init_format="pointcept")
    with pytest.raises(UsageError, match=r"no network that computes what backbone 'pointnext' does"):
        initialise(nn.Identity(), "x", of)


def test_formats_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"init_format: input should be 'run' or 'pointcept', got 'pointcep'"):
        recipe(None, **PLAIN, init_format="pointcep")
    file = saved(tmp_path / "public.pth", state_dict("SpUNet-v1m1"))
    with pytest.raises(MissingDataError, match=r"is not a run folder.*init_format=pointcept"):
        initialise(nn.Identity(), str(file), recipe(None, **PLAIN, init=str(file)))
