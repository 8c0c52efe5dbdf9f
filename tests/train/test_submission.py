from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ditr_cache.errors import DataError, MismatchError, MissingDataError, UnknownNameError, UnwritableError, UsageError
from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo
from ditr_cache.store import CacheWriter, open_cache
from ditr_train.benchmark_labels import NUSCENES, SCANNET, SCANNET200, SCANNETPP, SEMANTICKITTI
from ditr_train.cli import main
from ditr_train.evaluate import evaluate, predict_sample
from ditr_train.recipe import parse_recipe
from ditr_train.submission import BENCHMARKS, Submission
from ditr_train.trained import load_run
from ditr_train.trainer import train

TOKENS = ("16d39ff22a8545b0a4ee3236a0fe1c20", "ec093557a26a4fb5a8c7b4ae0b2c1b07")
IDS = {
    "scannet": ("scene0707_00", "scene0708_00"),
    "scannet200": ("scene0707_00", "scene0708_00"),
    "scannetpp": ("0d2ee665be", "7450386219"),
    "semantickitti": ("11/000000", "21/000042"),
    "nuscenes": TOKENS,
}
FILES = {
    "scannet": ["scene0707_00.txt", "scene0708_00.txt"],
    "scannet200": ["scene0707_00.txt", "scene0708_00.txt"],
    "scannetpp": ["0d2ee665be.txt", "7450386219.txt"],
    "semantickitti": ["sequences/11/predictions/000000.label", "sequences/21/predictions/000042.label"],
    "nuscenes": [f"lidarseg/test/{token}_lidarseg.bin" for token in TOKENS],
}
LABELS = {
    "scannet": SCANNET, "scannet200": SCANNET200, "scannetpp": SCANNETPP, "semantickitti": SEMANTICKITTI,
    "nuscenes": NUSCENES,
}  # fmt: skip


def write_cache(
    root: Path, dataset: str, ids: Sequence[str], *, splits: Sequence[str] = ("test", "test"),
    classes: Sequence[str] = (), labelled: Sequence[str] = (), lost: int = 0, points: int = 60,
) -> Path:  # fmt: skip
    """A cache of small clouds in shuffled order; `lost` points of the dataset are not in it."""
    names = tuple(classes or LABELS[dataset])
    metadata = CacheMetadata(
        dataset=dataset, class_names=names, class_colors=tuple((1, 2, 3) for _ in names), links=LinkSettings()
    )
    writer = CacheWriter.create(root, metadata)
    for i, (name, split) in enumerate(zip(ids, splits, strict=True)):
        rng, n = np.random.default_rng(i), points + i
        arrays = {
            "coord": rng.random((n, 3), dtype=np.float32),
            "color": rng.integers(0, 256, (n, 3), dtype=np.uint8),
            "source_index": rng.permutation(n + lost)[:n].astype(np.uint32),
            "offset": np.array([n], dtype=np.int64),
            "link_point": np.zeros(0, np.uint32),
            "link_uv": np.zeros((0, 2), np.uint16),
            "link_depth": np.zeros(0, np.float16),
        }
        if split in labelled:
            arrays["segment"] = rng.integers(0, len(names), n).astype(np.int16)
        info = SampleInfo(id=name, split=split, points=n, linked_points=0, views=())
        writer.commit_geometry(name.replace("/", "-"), [info], arrays)
    return root


def read_labels(dataset: str, content: bytes) -> list[int]:
    """What a server reads from one file, byte by byte."""
    if dataset.startswith("scannet"):
        assert content.endswith(b"\n") and b"\r" not in content and b" " not in content
        return [int(line) for line in content.decode("ascii").split("\n")[:-1]]
    size, form = (4, "<I") if dataset == "semantickitti" else (1, "B")
    assert len(content) % size == 0
    return [struct.unpack(form, content[i : i + size])[0] for i in range(0, len(content), size)]


@pytest.mark.parametrize("dataset", list(BENCHMARKS))
@pytest.mark.parametrize("backwards", [False, True])
def test_labels_arrive_in_the_datasets_order_and_ids(dataset: str, backwards: bool, tmp_path: Path) -> None:
    classes = list(LABELS[dataset])[:: -1 if backwards else 1]
    cache = open_cache(write_cache(tmp_path / "c", dataset, IDS[dataset], classes=classes))
    submission = Submission(tmp_path / "out", cache, "test", IDS[dataset], images=True)
    expected: dict[str, list[int]] = {}
    for name, file in zip(IDS[dataset], FILES[dataset], strict=True):
        source = cache.read(name).source_index
        prediction = np.random.default_rng(len(name)).integers(0, len(classes), len(source))
        submission.write(name, prediction)
        labels = [-1] * len(source)
        for place, chosen in zip(source.tolist(), prediction.tolist(), strict=True):
            labels[place] = LABELS[dataset][classes[chosen]]
        expected[file] = labels
    packed = submission.finish()
    assert packed == (tmp_path / "out.zip").resolve()
    with zipfile.ZipFile(packed) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/")]
        folders = [n for n in archive.namelist() if n.endswith("/")]
        extra = ["test/submission.json"] if dataset == "nuscenes" else []
        assert sorted(names) == sorted(FILES[dataset] + extra)
        for file, labels in expected.items():
            assert read_labels(dataset, archive.read(file)) == labels
            assert (tmp_path / "out" / file).read_bytes() == archive.read(file)
        if dataset == "semantickitti":  # the server's own validation looks for the entries of the folders
            assert {"sequences/", "sequences/11/", "sequences/11/predictions/", "sequences/21/"} <= set(folders)
        if dataset == "nuscenes":
            assert json.loads(archive.read("test/submission.json")) == {
                "meta": {
                    "use_camera": True, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": True,
                }
            }  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_the_tables_are_those_of_the_benchmarks() -> None:
    assert {name: len(labels) for name, labels in LABELS.items()} == {
        "scannet": 20, "scannet200": 200, "scannetpp": 100, "semantickitti": 19, "nuscenes": 16,
    }  # fmt: skip
    assert all(len(set(labels.values())) == len(labels) for labels in LABELS.values())
    assert list(SCANNET.values()) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39]
    assert (SCANNET200["wall"], SCANNET200["object"], SCANNET200["mattress"]) == (1, 1163, 1191)
    assert (SEMANTICKITTI["car"], SEMANTICKITTI["road"], SEMANTICKITTI["traffic-sign"]) == (10, 40, 81)
    assert (NUSCENES["barrier"], NUSCENES["vegetation"]) == (1, 16) and sorted(NUSCENES.values())[0] == 1


def test_scannet_ids_are_those_of_the_dataset() -> None:
    from ditr_cache.datasets.nyu40 import SCANNET20

    assert {info.name: nyu40_id for nyu40_id, info in SCANNET20.items()} == SCANNET


def test_an_incomplete_test_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(write_cache(tmp_path / "c", "scannet", IDS["scannet"]))
    Submission(tmp_path / "out", cache, "test", IDS["scannet"])
    assert "has 100 samples, the cache holds 2" in caplog.text


def test_wrong_use_is_found_before_a_file_is_made(tmp_path: Path) -> None:
    ids = IDS["scannet"]
    good = open_cache(write_cache(tmp_path / "good", "scannet", ids))
    before = sorted(tmp_path.iterdir())

    def fails(error: type[Exception], message: str, cache: Path, split: str = "test", ids: Sequence[str] = ids) -> None:
        with pytest.raises(error, match=message):
            Submission(tmp_path / "out", open_cache(cache), split, ids)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.zip").exists()

    rooms = write_cache(tmp_path / "rooms", "rooms", ids, classes=("floor", "wall"))
    fails(UnknownNameError, "benchmark of dataset 'rooms'.*Leave --submission out", rooms)
    few = write_cache(tmp_path / "few", "scannet", ids, classes=("floor", "wall", "poster"))
    fails(MismatchError, "expected 20, got 3; missing: bathtub.*unknown: poster", few)
    lost = write_cache(tmp_path / "lost", "scannet", ids, lost=2)
    fails(DataError, "sample 'scene070._00'.* [12] of the dataset's 6. points are not in the cache", lost)
    odd = write_cache(tmp_path / "odd", "scannet", ("../../etc", "scene0708_00"))
    fails(DataError, r"ids such as 'scene0707_00'", odd, ids=("../../etc", "scene0708_00"))
    scans = write_cache(tmp_path / "scans", "nuscenes", TOKENS, splits=("mini", "mini"))
    fails(UnknownNameError, "split of the benchmark of 'nuscenes' 'mini'", scans, "mini", TOKENS)
    for path in set(tmp_path.iterdir()) - set(before):
        assert path.name in ("rooms", "few", "lost", "odd", "scans")

    (tmp_path / "out.zip").write_bytes(b"")
    with pytest.raises(UsageError, match="exists already"):
        Submission(tmp_path / "out", good, "test", ids)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        Submission(tmp_path / "full", good, "test", ids)
    with pytest.raises(UnwritableError, match="cannot make"):
        Submission(tmp_path / "full" / "x" / "below", good, "test", ids)


# --- through the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a cache of dataset `scannet` whose test split has no labels."""
    root = tmp_path_factory.mktemp("scannet")
    cache = write_cache(
        root / "cache", "scannet", ("scene0000_00", "scene0001_00", "scene0707_00", "scene0708_00"),
        splits=("train", "val", "test", "test"), labelled=("train", "val"),
    )  # fmt: skip
    backbone = {"stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 8], "layers": [1, 1]}
    recipe = parse_recipe(
        {
            "cache": str(cache),
            "data": {"grid_size": 0.2, "feat": ["color"], "batch_size": 1, "workers": 0},
            "model": {"backbone": backbone},
            "training": {"steps": 2},
        }
    )
    train(recipe, root / "run", device="cpu", quiet=True)
    return root / "run"


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(args))
    return int(done.value.code or 0)


@pytest.mark.parametrize("protocol", ["fast", "full"])
def test_eval_writes_the_predictions_of_an_unlabelled_split(
    run: Path, protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ("eval", str(run), "--split", "test", "--protocol", protocol, "--device", "cpu", "--submission", str(out))
    assert call(*args) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == f"2 samples predicted, upload {out}.zip" and "mIoU" not in captured.out
    trained = load_run(run, device="cpu")
    for name in ("scene0707_00", "scene0708_00"):
        predicted = predict_sample(trained, name, protocol)
        ids = [list(SCANNET.values())[c] for c in predicted]
        assert read_labels("scannet", (out / f"{name}.txt").read_bytes()) == ids
    kept = json.loads((run / "eval" / f"test-best-{protocol}.json").read_text())
    assert kept["labelled"] is False and kept["mIoU"] is None and kept["submission"] == f"{out}.zip"
    assert call(*args) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_labelled_split_is_scored_and_written(run: Path, tmp_path: Path) -> None:
    results = evaluate(run, device="cpu", submission=tmp_path / "out")
    assert results["mIoU"] is not None and results["labelled"] and (tmp_path / "out" / "scene0001_00.txt").exists()
    assert results["IoU"] == evaluate(run, device="cpu")["IoU"]


def test_an_unlabelled_split_needs_a_submission(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", str(run), "--split", "test", "--device", "cpu") == 2
    errors = capsys.readouterr().err
    assert "--submission DIR" in errors and "Traceback" not in errors
    with pytest.raises(MissingDataError):
        evaluate(run, "test", device="cpu")


def test_the_command_names_the_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", str(run), "--device", "cpu") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("fast protocol") == 2 and "full" not in out
    assert call("eval", str(run), "--device", "cpu", "--protocol", "full", "--tta", "waymo") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("full protocol, TTA waymo") == 2 and "fast" not in out
    assert call("eval", str(run), "--device", "cpu", "--protocol", "full", "--tta", "waimo") == 2
    assert "did you mean 'waymo'" in capsys.readouterr().err
    assert call("eval", str(run), "--tta", "waymo") == 2
    assert "--protocol full" in capsys.readouterr().err


def test_indices_of_scannetpp_are_the_lines_of_its_list() -> None:
    top100 = Path(__file__).parents[2] / "ditr_cache" / "datasets" / "scannetpp" / "top100.txt"
    assert top100.read_text().splitlines() == list(SCANNETPP) and list(SCANNETPP.values()) == list(range(100))
