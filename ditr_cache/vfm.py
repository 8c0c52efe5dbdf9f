"""`FrozenVFM`: images -> grids of tokens, through timm."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
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


class LaunchedPass:
    """A forward pass that was started.

    Args:
        vfm: its name.
        tokens: [B, rows, columns, C] float32 on the device, perhaps not there yet.
        finite: [B] bool on the host, whether all tokens of an image are finite; perhaps not there yet.
        done: when both are there; None: now.
    """

    def __init__(
        self, vfm: str, tokens: torch.Tensor, finite: torch.Tensor, done: torch.cuda.Event | None = None
    ) -> None:
        self.tokens = tokens
        self._vfm, self._finite, self._done = vfm, finite, done

    def outcomes(self) -> list[torch.Tensor | DataError]:
        """Tokens [rows, columns, C] of each image, or what is wrong with them; waits for them."""
        if self._done is not None:
            self._done.synchronize()
        wrong = f"VFM {self._vfm!r}: tokens hold NaN or infinity; are the weights damaged?"
        finite: list[bool] = self._finite.tolist()
        return [grid if good else DataError(wrong) for grid, good in zip(self.tokens, finite, strict=True)]


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
        self._streams = threading.local()

    def prepare(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image [H, W, 3] uint8 resized to the network's size, [h, w, 3] uint8. Safe to call from threads.

        The whole image is resized, never cropped, so that fractions of the image stay what they are.
        """
        height, width = self.spec.image_size
        if image.shape[:2] == (height, width):
            return image
        resample = Image.Resampling[self.spec.interpolation.upper()]
        return np.asarray(Image.fromarray(image).resize((width, height), resample))

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Tokens [B, rows, columns, C] float32 on the device, of images that `prepare` returned.

        Raises:
            DataError: tokens that are not finite.
        """
        launched = self.launch(images)
        for outcome in launched.outcomes():
            if isinstance(outcome, DataError):
                raise outcome
        return launched.tokens

    @torch.inference_mode()
    def launch(self, images: Sequence[NDArray[np.uint8]]) -> LaunchedPass:
        """Start the forward pass of images that `prepare` returned; on a GPU it goes on after this call.

        Raises:
            DataError: tokens of another shape than the spec says.
        """
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            # From page-locked memory the copy goes on beside the pass that is running; torch keeps it until it is done.
            staged = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=on_gpu)
            np.stack(images, out=staged.numpy())
            pixels = staged.to(self.device, non_blocking=True)
            pixels = (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std
            tokens = self._run(pixels).float().permute(0, 2, 3, 1).contiguous()
            expected = (len(images), *self.spec.grid, self.spec.dim)
            if tuple(tokens.shape) != expected:
                raise DataError(f"VFM {self.spec.name!r}: expected tokens {list(expected)}, got {list(tokens.shape)}")
            finite = torch.isfinite(tokens).flatten(1).all(dim=1)
            if not on_gpu:
                return LaunchedPass(self.spec.name, tokens, finite)
            # Asking the device would also wait for passes that are launched after this one.
            told = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            return LaunchedPass(self.spec.name, tokens, told, done)

    @contextlib.contextmanager
    def stream_of_thread(self) -> Iterator[None]:
        """On a GPU, a stream for the calling thread: what it does there does not queue up behind forward passes."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._streams, "stream"):  # one a thread, whose memory is used again
            self._streams.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._streams.stream):
            yield

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
