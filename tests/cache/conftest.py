"""Small caches, weights and datasets that several tests of the cache need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ditr_cache.schema import CacheMetadata, GeometryRecord, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter
from plain_rows import encode
from support import Run, call_command


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other where arrays are tiny."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """`ditr-cache ARGUMENTS` in this process."""
    return partial(call_command, monkeypatch, capsys, caplog)


def vfm_spec(**changes: object) -> VFMSpec:
    spec = VFMSpec(
        name="fake", architecture="fake_net", weights_sha256="0" * 64, tap="blocks.3", norm=True,
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="bicubic", image_size=(28, 42), grid=(2, 3), dim=5,
        layout="fused", fuse="mean", codec="float16",
    )  # fmt: skip
    return replace(spec, **changes)


def cache_metadata(**changes: object) -> CacheMetadata:
    metadata = CacheMetadata(
        dataset="fake",
        class_names=("floor", "wall"),
        class_colors=((10, 20, 30), (200, 100, 50)),
        links=LinkSettings(),
    )
    return replace(metadata, **changes)


def geometry_arrays(samples: Sequence[tuple[str, int]], seed: int = 0) -> tuple[list[SampleInfo], dict]:
    """Infos and arrays of a geometry partition with samples of (id, number of points); two views a sample."""
    rng = np.random.default_rng(seed)
    infos, link_point, base = [], [], 0
    for name, points in samples:
        seen = [np.flatnonzero(rng.random(points) < share) for share in (0.6, 0.4)]
        views = tuple(ViewInfo(id=f"v{i}", links=len(s)) for i, s in enumerate(seen))
        linked = len(np.unique(np.concatenate(seen)))
        split = "train" if len(infos) % 2 == 0 else "val"
        infos.append(SampleInfo(id=name, split=split, points=points, linked_points=linked, views=views))
        link_point += [s + base for s in seen]
        base += points
    point = np.concatenate(link_point).astype(np.uint32)
    arrays = {
        "coord": rng.normal(size=(base, 3)).astype(np.float32),
        "color": rng.integers(0, 256, (base, 3), dtype=np.uint8),
        "normal": rng.normal(size=(base, 3)).astype(np.float16),
        "strength": rng.random(base).astype(np.float32),
        "segment": rng.integers(-1, 2, base).astype(np.int16),
        "instance": rng.integers(-1, 9, base).astype(np.int32),
        "source_index": np.concatenate([rng.permutation(n) for _, n in samples]).astype(np.uint32),
        "offset": np.cumsum([n for _, n in samples], dtype=np.int64),
        "link_point": point,
        "link_uv": rng.integers(0, 65536, (len(point), 2)).astype(np.uint16),
        "link_depth": rng.uniform(0.5, 5, len(point)).astype(np.float16),
    }
    return infos, arrays


def feature_rows(geometry: GeometryRecord, arrays: dict, spec: VFMSpec, seed: int = 0) -> tuple:
    """Float rows [T, C] and index [N]: one row per linked point."""
    rng = np.random.default_rng(seed)
    index = np.full(sum(s.points for s in geometry.samples), -1, dtype=np.int32)
    visible = np.unique(arrays["link_point"])
    index[visible] = np.arange(len(visible))
    return rng.normal(size=(len(visible), spec.dim)).astype(np.float32), index


def write_partition(writer: CacheWriter, partition: str, samples: Sequence[tuple[str, int]], *specs: VFMSpec) -> dict:
    """Commit one partition and its features; returns its arrays, and under each VFM key (rows, index)."""
    infos, arrays = geometry_arrays(samples, seed=len(partition))
    record = writer.commit_geometry(partition, infos, arrays)
    written = dict(arrays)
    for spec in specs:
        rows, index = feature_rows(record, arrays, spec, seed=spec.dim)
        writer.commit_features(spec, record, encode(rows, spec.codec), index, images=2 * len(samples))
        written[spec.key] = rows, index
    return written


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., VFMSpec]:
    return vfm_spec


@pytest.fixture(scope="session")
def make_metadata() -> Callable[..., CacheMetadata]:
    return cache_metadata


@pytest.fixture(scope="session")
def make_arrays() -> Callable[..., tuple[list[SampleInfo], dict]]:
    return geometry_arrays


@pytest.fixture(scope="session")
def make_partition() -> Callable[..., dict]:
    return write_partition


@pytest.fixture
def writer(tmp_path: Path) -> CacheWriter:
    """A writer of a new, empty cache."""
    return CacheWriter.create(tmp_path / "cache", cache_metadata())


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save random weights of a (tiny) timm model without its classifier; the same seed gives the same weights."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(architecture: str = "test_vit", seed: int = 0) -> Path:
        from ditr_cache.torchvision_compat import declare_missing_operators

        path = folder / f"{architecture}-{seed}.pt"
        if not path.exists():
            declare_missing_operators()
            import timm
            import torch

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = timm.create_model(architecture, pretrained=False, num_classes=0)
                # timm starts norms and biases at 1 and 0 and position at almost 0: nothing would depend on them.
                state = {k: v + 0.1 * torch.randn(v.shape) if v.is_floating_point() else v
                         for k, v in model.state_dict().items()}  # fmt: skip
                state = {k: v.abs() if k.endswith("running_var") else v for k, v in state.items()}
            torch.save(state, path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small generated rooms in the ScanNet layout (dataset `rooms`)."""
    from ditr_cache.synthesize import RoomsSettings, synthesize

    root = tmp_path_factory.mktemp("rooms") / "data"
    settings = RoomsSettings(frames=4, color_size=(96, 64), depth_size=(48, 32), point_spacing=0.12)
    synthesize(root, scenes=3, seed=0, settings=settings)
    return root


@pytest.fixture(scope="session")
def bed():
    """The analytic test bed, `analytic_scene.py`."""
    from ditr_cache.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    import analytic_scene

    return analytic_scene


@pytest.fixture(scope="session")
def position_checkpoint(bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that make a ViT's tokens speak of positions, see `analytic_scene.py`."""
    return bed.write_checkpoint(tmp_path_factory.mktemp("analytic") / "position.pt")


@pytest.fixture
def position_vfm(bed, position_checkpoint):
    return bed.load_vfm(position_checkpoint)
