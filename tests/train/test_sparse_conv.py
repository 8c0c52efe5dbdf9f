from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import UnknownNameError, UsageError
from ditr_train.models import sparse_backend
from ditr_train.models.sparse_conv import SparseConv3d, SparseInverseConv3d, SubMConv3d, sparse_tensor

ROOT = Path(__file__).parents[2]
SHAPE = (16, 16, 16)


def random_sites(seed: int = 0, batch: int = 2, count: int = 150, edge: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sites = torch.randint(0, edge, (batch * count, 3), generator=generator)
    samples = torch.arange(batch).repeat_interleave(count)
    sites = torch.cat([samples[:, None], sites], dim=1).unique(dim=0)
    sites = sites[torch.randperm(len(sites), generator=generator)]
    return sites[:, 0], sites[:, 1:]


def to_dense(rows: Tensor, sites: Tensor, shape: tuple[int, ...]) -> Tensor:
    dense = rows.new_zeros(int(sites[:, 0].max()) + 1, *shape, rows.shape[1])
    return dense.index_put(tuple(sites.long().T), rows).permute(0, 4, 1, 2, 3)


def at_sites(dense: Tensor, sites: Tensor) -> Tensor:
    return dense.permute(0, 2, 3, 4, 1)[tuple(sites.long().T)]


def compare(rows: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert rows.shape == expected.shape
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((rows * weights).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("train", [True, False])
def test_submanifold_convolution_equals_dense(kernel: int, train: bool) -> None:
    torch.manual_seed(0)
    batch, grid = random_sites()
    feat = torch.randn(len(grid), 4, requires_grad=True)
    conv = SubMConv3d(4, 6, kernel, bias=False).train(train)
    voxels = sparse_tensor(feat, grid, batch, 2, 4)
    out = conv(voxels)
    assert torch.equal(out.indices, voxels.indices)
    dense = F.conv3d(to_dense(feat, voxels.indices, SHAPE), conv.weight.permute(0, 4, 1, 2, 3), padding=kernel // 2)
    compare(out.features, at_sites(dense, out.indices), [feat, conv.weight])


def test_strided_and_inverse_convolution_equal_dense() -> None:
    torch.manual_seed(0)
    batch, grid = random_sites()
    feat = torch.randn(len(grid), 4, requires_grad=True)
    down = SparseConv3d(4, 6, 2, stride=2, bias=False, indice_key="down")
    up = SparseInverseConv3d(6, 5, 2, bias=False, indice_key="down")
    voxels = sparse_tensor(feat, grid, batch, 2, 1)
    coarse = down(voxels)
    dense = F.conv3d(to_dense(feat, voxels.indices, (16, 16, 16)), down.weight.permute(0, 4, 1, 2, 3), stride=2)
    compare(coarse.features, at_sites(dense, coarse.indices), [feat, down.weight])
    fine = up(coarse)
    assert torch.equal(fine.indices, voxels.indices)
    coarse_dense = to_dense(at_sites(dense, coarse.indices), coarse.indices, (8, 8, 8))
    back = F.conv_transpose3d(coarse_dense, up.weight.permute(4, 0, 1, 2, 3), stride=2)
    compare(fine.features, at_sites(back, fine.indices), [feat, down.weight, up.weight])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grid=st.lists(st.tuples(*[st.integers(0, 70)] * 3), min_size=1, max_size=40, unique=True),
    split=st.integers(0, 40),
)
def test_sites_of_every_level_are_the_shifted_grid_coordinates(grid: list[tuple[int, int, int]], split: int) -> None:
    coord = torch.tensor(grid)
    batch = (torch.arange(len(coord)) >= split).long()
    voxels = sparse_tensor(torch.ones(len(coord), 1), coord, batch, 2, 4)
    for level in range(1, 5):
        voxels = SparseConv3d(1, 1, 2, stride=2, bias=False)(voxels)
        expected = torch.cat([batch[:, None], coord >> level], dim=1).unique(dim=0)
        assert torch.equal(voxels.indices.long().unique(dim=0), expected)
        assert len(voxels.indices) == len(expected)


def test_algorithm_follows_the_device_and_the_weights_stay() -> None:
    conv = SubMConv3d(2, 2, 3, bias=False)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    assert conv.gpu_algo != sparse_backend.ConvAlgo.Native or sparse_backend.CPU_ONLY
    batch, grid = random_sites()
    conv(sparse_tensor(torch.ones(len(grid), 2), grid, batch, 2, 0))
    assert conv.algo == sparse_backend.ConvAlgo.Native
    assert conv.gpu_algo == SubMConv3d(2, 2, 3, bias=False).algo
    assert {name: torch.equal(before[name], value) for name, value in conv.state_dict().items()} == {"weight": True}
    assert copy.deepcopy(conv).gpu_algo == conv.gpu_algo


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("train", [True, False])
def test_gpu_agrees_with_cpu(train: bool) -> None:
    torch.manual_seed(0)
    batch, grid = random_sites()
    feat = torch.randn(len(grid), 16)
    conv = SubMConv3d(16, 16, 3, bias=False).train(train)
    expected = conv(sparse_tensor(feat, grid, batch, 2, 0)).features
    conv.cuda()
    voxels = sparse_tensor(feat.cuda(), grid.cuda(), batch.cuda(), 2, 0)
    torch.testing.assert_close(conv(voxels).features.cpu(), expected, atol=1e-4, rtol=1e-4)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 1e-4)):
        with torch.autocast("cuda", dtype=dtype):
            torch.testing.assert_close(conv(voxels).features.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(conv.cpu()(sparse_tensor(feat, grid, batch, 2, 0)).features, expected)


def test_cpu_autocast_leaves_the_convolution_in_float32() -> None:
    batch, grid = random_sites()
    conv = SubMConv3d(2, 2, 3, bias=False)
    voxels = sparse_tensor(torch.ones(len(grid), 2), grid, batch, 2, 0)
    expected = conv(voxels).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(voxels).features
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_type_are_refused(dtype: torch.dtype) -> None:
    batch, grid = random_sites()
    conv = SubMConv3d(2, 2, 3, bias=False).to(dtype)
    with pytest.raises(UsageError, match=r"float32.*autocast"):
        conv(sparse_tensor(torch.ones(len(grid), 2), grid, batch, 2, 0))


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1, 2], [3, 0xFFFFFFFF]], dtype=np.uint32),
        np.arange(6, dtype=np.int32)[::2],
        np.array([0.5, -2.0], dtype=np.float32),
    ],
    ids=["uint32", "int32 strided", "float32"],
)
def test_torch_backed_tensorview_keeps_values_and_type(array: np.ndarray) -> None:
    tensor = sparse_backend.tensorview_from_numpy(array)  # owns the memory of the view
    copied = tensor.numpy_view()
    assert copied.dtype == array.dtype
    np.testing.assert_array_equal(copied, array)


def test_old_cumm_reads_numpy_2_through_torch() -> None:
    import cumm
    import cumm.tensorview

    old = tuple(int(part) for part in cumm.__version__.split(".")[:2]) < (0, 5)
    replaced = cumm.tensorview.from_numpy is sparse_backend.tensorview_from_numpy
    assert replaced == (old and np.lib.NumpyVersion(np.__version__) >= "2.0.0")


def test_without_any_library_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    spec = importlib.util.spec_from_file_location("sparse_backend_without_spconv", sparse_backend.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(UsageError, match=r"cu120.*cu126.*triton"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    monkeypatch.setenv("DITR_SPARSE_BACKEND", "spconv-triton")
    with pytest.raises(UnknownNameError, match="spconv_triton"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_backend_that_is_asked_for_computes(tmp_path: Path) -> None:
    """A stand-in: the library itself needs a GPU to be imported."""
    package = tmp_path / "spconv_triton"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "core.py").write_text("class ConvAlgo: Native, Gemm = 0, 1\n")
    (package / "pytorch" / "ops.py").touch()
    (package / "pytorch" / "__init__.py").write_text(
        "import torch\n"
        "class SparseConvTensor:\n"
        "    def __init__(self, features, *rest): self.features, self.rest = features, rest\n"
        "    def replace_feature(self, features): return SparseConvTensor(features, *self.rest)\n"
        "class SubMConv3d(torch.nn.Module):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__()\n"
        "        self.algo, self.name, self.bias, self.weight = 1, None, None, torch.nn.Parameter(torch.ones(1))\n"
        "    def _conv_forward(self, training, x, weight, bias, add_input=None, name=None):\n"
        "        return x.replace_feature(x.features + 41)\n"
        "SparseConv3d = SparseInverseConv3d = SubMConv3d\n"
    )
    program = (
        "import torch\n"
        "from ditr_train.models import sparse_backend, sparse_conv\n"
        "z = torch.zeros(1, 3).int()\n"
        "voxels = sparse_conv.sparse_tensor(torch.ones(1, 1), z, z[:, 0], 1, 0)\n"
        "try: sparse_conv.SubMConv3d(1, 1, 3)(voxels)\n"
        "except Exception as error: print(error)\n"
        "sparse_conv.RUNS_ON_CPU = True\n"
        "print(sparse_backend.BACKEND, sparse_conv.SubMConv3d(1, 1, 3)(voxels).features.item())\n"
    )
    environment = os.environ | {"DITR_SPARSE_BACKEND": "spconv_triton", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    refusal, computed = done.stdout.splitlines()
    assert "spconv_triton computes on a GPU only" in refusal and "cu126" in refusal
    assert computed == "spconv_triton 42.0"


def test_import_and_use_are_quiet() -> None:
    program = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from ditr_train.models.sparse_conv import SubMConv3d, sparse_tensor\n"
        "z = torch.zeros(1, 3).int(); SubMConv3d(1, 1, 3)(sparse_tensor(torch.ones(1, 1), z, z[:, 0], 1, 4))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
