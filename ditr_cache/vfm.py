"""`FrozenVFM`: images -> grids of tokens, through timm."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ditr_cache.errors import DataError, DeviceError, UnknownNameError, UsageError
from ditr_cache.schema import DEFAULT_GRID, VFMSpec
from ditr_cache.torchvision_compat import declare_missing_operators
from ditr_cache.weights import load_weights, weights_digest

SHORT_NAMES: dict[str, str] = {
    "dinov2-small": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-giant": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-small": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-base": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-large": "vit_large_patch16_dinov3.lvd1689m",
    "siglip2-base": "vit_base_patch16_siglip_512.v2_webli",
    "siglip2-large": "vit_large_patch16_siglip_512.v2_webli",
    "clip-large": "vit_large_patch14_clip_336.openai",
    "radio3-base": "vit_base_patch16_radio_v3.c_radio",
    "efficientnet-lite0": "tf_efficientnet_lite0",
}
"""Short names of common VFMs -> timm's names. DINOv2 with registers, as in DITR."""

CONVOLUTIONAL_STRIDE = 16
"""Convolutional backbones are tapped at the deepest feature map of at most this stride: deeper maps are too coarse
for points, and stride 16 gives as many tokens as a ViT/16."""


@dataclass(frozen=True, kw_only=True)
class VFMRequest:
    """What the user asked for.

    Args:
        name: short name or timm name.
        checkpoint: weights file; None: package or hub.
        image_size: (height, width), multiples of the patch; None: as many patches as `grid` says.
        grid: tokens (rows, columns); None: `DEFAULT_GRID`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        compile: run the network through torch.compile.
    """

    name: str
    checkpoint: str | None = None
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    device: str = "auto"
    compile: bool = False


def resolve_device(device: str) -> torch.device:
    """Torch device of a --device value. Raises `DeviceError` where CUDA is asked for and absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"device {device!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch and check `nvidia-smi`"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N") from error


class FrozenVFM:
    """A vision foundation model, frozen, that turns images into grids of patch tokens.

    Tokens are the final layer's patch tokens after the final norm, without prefix tokens (DITR, section 3.1 of arXiv
    2503.18944); for convolutional backbones the feature map named in `CONVOLUTIONAL_STRIDE`.

    Raises:
        UnknownNameError: no such model; names the nearest.
        WeightsError: no weights, or they do not fit.
        UsageError: an image size that is no multiple of the patch.
        DeviceError: CUDA asked for and absent.
    """

    def __init__(self, request: VFMRequest) -> None:
        declare_missing_operators()
        import timm

        self.device = resolve_device(request.device)
        architecture = SHORT_NAMES.get(request.name, request.name)
        if not timm.is_model(architecture.split(".")[0]):
            raise UnknownNameError.of("VFM", request.name, [*SHORT_NAMES, *timm.list_models()])
        try:
            timm.models.get_pretrained_cfg(architecture)
        except RuntimeError as error:  # the part after the dot, its variant of pretrained weights
            known = timm.list_pretrained(f"{architecture.split('.')[0]}.*")
            raise UnknownNameError.of("VFM", request.name, known) from error
        model: Any = _create(architecture)
        if not hasattr(model, "forward_intermediates"):
            raise UsageError(f"VFM {request.name!r}: timm's {architecture!r} gives no intermediate features")
        levels = model.feature_info.info if hasattr(model.feature_info, "info") else model.feature_info
        prefix_tokens = getattr(model, "num_prefix_tokens", None)
        if prefix_tokens is None:
            self._level = max((i for i, f in enumerate(levels) if f["reduction"] <= CONVOLUTIONAL_STRIDE), default=0)
        else:
            self._level = len(levels) - 1
        level = levels[self._level]
        stride = int(level["reduction"])
        grid = request.grid or DEFAULT_GRID
        size = request.image_size or (grid[0] * stride, grid[1] * stride)
        if min(size) < stride or size[0] % stride or size[1] % stride:
            near = tuple(max(1, round(s / stride)) * stride for s in size)
            raise UsageError(
                f"image size {size[0]}x{size[1]} does not fit {request.name!r}: height and width must be multiples of "
                f"its patch of {stride} pixels; the nearest is --image-size {near[0]}x{near[1]}"
            )
        embedding: Any = getattr(model, "patch_embed", None)
        if getattr(embedding, "strict_img_size", False) and tuple(embedding.img_size) != tuple(size):
            native = "x".join(str(s) for s in embedding.img_size)
            raise UsageError(f"VFM {request.name!r} takes images of one size only: pass --image-size {native}")
        load_weights(model, architecture.split(".")[0], Path(request.checkpoint) if request.checkpoint else None)
        config = timm.data.resolve_data_config({}, model=model)
        self.spec = VFMSpec(
            name=request.name,
            architecture=architecture.split(".")[0],
            weights_sha256=weights_digest(model.state_dict()),
            tap=level["module"],
            norm=prefix_tokens is not None,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            image_size=(size[0], size[1]),
            grid=(size[0] // stride, size[1] // stride),
            dim=int(level["num_chs"]),
        )
        """Everything about the model; layout, fuse and codec are the extraction's to set."""
        self._model: Any = model.eval().requires_grad_(False).to(self.device)
        self._run = torch.compile(self._forward) if request.compile else self._forward
        self._mean = torch.tensor(self.spec.mean, device=self.device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(self.spec.std, device=self.device).view(1, 3, 1, 1) * 255

    def prepare(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image [H, W, 3] uint8 resized to the network's size, [h, w, 3] uint8. Safe to call from threads.

        The whole image is resized, never cropped, so that fractions of the image stay what they are.
        """
        height, width = self.spec.image_size
        if image.shape[:2] == (height, width):
            return image
        resample = Image.Resampling[self.spec.interpolation.upper()]
        return np.asarray(Image.fromarray(image).resize((width, height), resample))

    @torch.inference_mode()
    def embed(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Tokens [B, rows, columns, C] float32 on the device, of images that `prepare` returned.

        Raises:
            DataError: tokens that are not finite.
        """
        pixels = torch.from_numpy(np.stack(images)).to(self.device, non_blocking=True)
        pixels = (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std
        tokens = self._run(pixels).float().permute(0, 2, 3, 1).contiguous()
        expected = (len(images), *self.spec.grid, self.spec.dim)
        if tuple(tokens.shape) != expected:
            raise DataError(f"VFM {self.spec.name!r}: expected tokens {list(expected)}, got {list(tokens.shape)}")
        if not bool(torch.isfinite(tokens).all()):
            raise DataError(f"VFM {self.spec.name!r}: tokens hold NaN or infinity; are the weights damaged?")
        return tokens

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        amp = torch.autocast("cuda", dtype=torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()
        with amp:
            maps: list[torch.Tensor] = self._model.forward_intermediates(
                pixels,
                indices=[self._level],
                norm=self.spec.norm,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        return maps[0]


def _create(architecture: str) -> Any:
    """A timm model without weights and classifier that takes images of any size, where its kind can."""
    import timm

    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # convolutional backbones have no such argument
        return timm.create_model(architecture, pretrained=False, num_classes=0)
