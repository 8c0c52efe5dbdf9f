"""`depth.bin` of ScanNet++: the three encodings in any order of frames, and what is broken."""

import zlib

import numpy as np
import pytest

from ditr_cache.datasets.scannetpp import depth as scannetpp_depth
from ditr_cache.errors import DataError, MissingDataError
from layouts import scannetpp as layout


@pytest.fixture
def depth_file(tmp_path):
    """Write depth maps in an encoding; the file, and the maps in metres."""

    def write(encoding, count=5):
        rng = np.random.default_rng(3)
        maps = [np.repeat(rng.uniform(0.5, 4, (192, 8)), 32, axis=1).astype(np.float32) for _ in range(count)]
        path = tmp_path / f"{encoding}.bin"
        path.write_bytes(layout._depth_bin(maps, encoding))
        return path, maps

    return write


@pytest.mark.parametrize("encoding", ["lz4", "zlib", "zlib_whole"])
def test_depth_in_any_order(depth_file, encoding):
    path, maps = depth_file(encoding)
    for number in (0, 3, 4, 1, 1):
        found = scannetpp_depth.read_depth_frame(path, number, where="x")
        np.testing.assert_allclose(found, maps[number], atol=1.1e-3)
    with pytest.raises(DataError, match=r"x: .* holds 5 depth maps, from 0; .*download it again"):
        scannetpp_depth.read_depth_frame(path, 5, where="x")


@pytest.mark.parametrize("cut", [0.5, 0.05])
@pytest.mark.parametrize("encoding", ["lz4", "zlib", "zlib_whole"])
def test_truncated_depth(depth_file, encoding, cut):
    path, maps = depth_file(encoding)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    if cut == 0.5:
        np.testing.assert_allclose(scannetpp_depth.read_depth_frame(path, 1, where="x"), maps[1], atol=1.1e-3)
    with pytest.raises(DataError, match=r"x: .*bin.* truncated or damaged, download it again"):
        scannetpp_depth.read_depth_frame(path, 3, where="x")


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"not depth at all", bytes(range(256)) * 40])
def test_files_that_hold_no_depth(tmp_path, content):
    path = tmp_path / "depth.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"frame 0: .*depth.bin"):
        scannetpp_depth.read_depth_frame(path, 0, where="frame 0")
    with pytest.raises(MissingDataError, match=r"frame 0: no such file .*nothing.bin"):
        scannetpp_depth.read_depth_frame(tmp_path / "nothing.bin", 0, where="frame 0")


def test_blocks_of_another_size_and_bombs(tmp_path):
    path = tmp_path / "depth.bin"
    for raw in (b"\0" * 1000, b"\0" * 50_000_000):
        packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
        block = packer.compress(raw) + packer.flush()
        path.write_bytes(len(block).to_bytes(4, "little") + block)
        with pytest.raises(DataError, match=r"expected 256x192 values of 4 bytes, got (1000|196609) bytes"):
            scannetpp_depth.read_depth_frame(path, 0, where="x")


def test_depth_that_is_not_finite_is_unknown(tmp_path):
    depth = np.ones((192, 256), dtype=np.float32)
    depth[0, :3] = np.nan, np.inf, -np.inf
    path = tmp_path / "depth.bin"
    path.write_bytes(layout._depth_bin([depth], "zlib"))
    assert scannetpp_depth.read_depth_frame(path, 0, where="x").sum() == depth.size - 3
