"""Predictions in the formats of the benchmark servers, as a folder and as the zip file to upload.

This is the one place that knows how a sample's id becomes a file name. The ids are the obvious ones of each dataset,
and the dataset's adapter has to use them:

| dataset | sample id | file |
| --- | --- | --- |
| scannet, scannet200 | scene, `scene0707_00` | `scene0707_00.txt` |
| scannetpp | scene, `0d2ee665be` | `0d2ee665be.txt` |
| semantickitti | sequence and scan, `11/000042` | `sequences/11/predictions/000042.label` |
| nuscenes | token of the lidar's sample_data | `lidarseg/<split>/<token>_lidarseg.bin` |

Formats:

- ScanNet and ScanNet200: one line per vertex of `<scene>_vh_clean_2.ply` in its order, with the label id as an integer;
  the zip holds the files of all scenes and no folder (https://kaldir.vc.in.tum.de/scannet_benchmark/documentation,
  "Format for 3D Semantic Label Prediction").
- ScanNet++: likewise of `mesh_aligned_0.05.ply`, with the index of the class in `top100.txt`, 0 to 99
  (README.md, "3D Semantic Segmentation Evaluation", of github.com/scannetpp/scannetpp).
- SemanticKITTI: uint32 label of every point of the scan, in the original ids; the zip holds `sequences` with entries
  for its folders (README.md and validate_submission.py of github.com/PRBonn/semantic-kitti-api).
- nuScenes: uint8 index of every point, 1 to 16; beside them `<split>/submission.json` tells the inputs of the method
  (python-sdk/nuscenes/eval/lidarseg/README.md of github.com/nutonomy/nuscenes-devkit). Little-endian, as all of these.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MismatchError, StorageError, UnknownNameError, UnwritableError, UsageError
from ditr_cache.store import CacheReader
from ditr_train.benchmark_labels import NUSCENES, SCANNET, SCANNET200, SCANNETPP, SEMANTICKITTI
from ditr_train.files import temporary_name

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a server expects.

    Args:
        labels: name of each class -> id in the files.
        sample_id: what the sample ids look like, and `example` one of them.
        file: path of a sample's file, of its id's parts {0}, {1}, ... (between slashes) and {split}.
        encode: content of a file from the label ids [M] of all points.
        test_samples: in the official test split.
        splits: that a submission can be for; None takes any.
        inputs: path of the file that tells what the method reads, of {split}; None where there is none.
    """

    labels: Mapping[str, int]
    sample_id: re.Pattern[str]
    example: str
    file: str
    encode: Callable[[NDArray[np.int64]], bytes]
    test_samples: int
    splits: tuple[str, ...] | None = None
    inputs: str | None = None


def _lines(labels: NDArray[np.int64]) -> bytes:
    return "".join(f"{label}\n" for label in labels.tolist()).encode("ascii")


def _lines_of_scenes(labels: Mapping[str, int], sample_id: str, example: str, test_samples: int) -> Benchmark:
    """A file of lines per scene, as ScanNet's servers and that of ScanNet++ take them."""
    return Benchmark(
        labels=labels,
        sample_id=re.compile(sample_id),
        example=example,
        file="{0}.txt",
        encode=_lines,
        test_samples=test_samples,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "scannet": _lines_of_scenes(SCANNET, r"scene\d{4}_\d{2}", "scene0707_00", 100),
    "scannet200": _lines_of_scenes(SCANNET200, r"scene\d{4}_\d{2}", "scene0707_00", 100),
    "scannetpp": _lines_of_scenes(SCANNETPP, r"[0-9a-f]{10}", "0d2ee665be", 50),
    "semantickitti": Benchmark(
        labels=SEMANTICKITTI,
        sample_id=re.compile(r"\d{2}/\d{6}"),
        example="11/000042",
        file="sequences/{0}/predictions/{1}.label",
        encode=lambda labels: labels.astype("<u4").tobytes(),
        test_samples=20351,
    ),
    "nuscenes": Benchmark(
        labels=NUSCENES,
        sample_id=re.compile(r"[0-9a-f]{32}"),
        example="16d39ff22a8545b0a4ee3236a0fe1c20",
        file="lidarseg/{split}/{0}_lidarseg.bin",
        encode=lambda labels: labels.astype("u1").tobytes(),
        test_samples=6008,
        splits=("train", "val", "test"),
        inputs="{split}/submission.json",
    ),
}
"""Dataset of a cache -> its benchmark."""


class Submission:
    """Writes the predictions of a split. Everything that can be refused is refused here, before any is made.

    Args:
        folder: to write to; `finish` puts the zip file beside it, with `.zip` added to its name.
        cache: of the split.
        split: whose samples are predicted.
        ids: these samples.
        images: whether the network reads features of images.
        pretrained: whether it was trained with them, and reads points alone.

    Raises:
        UsageError: a dataset or split without a server, or a folder or zip file that exists.
        MismatchError: the cache's classes are not the benchmark's.
        DataError: a sample id that is not the dataset's, or points of the dataset that the cache lacks.
        UnwritableError: the folder cannot be made.
        CacheError: a sample that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: CacheReader,
        split: str,
        ids: Sequence[str],
        *,
        images: bool = False,
        pretrained: bool = False,
    ) -> None:
        self.cache, self.split = cache, split
        self.folder = Path(folder).resolve()
        self.zip = self.folder.parent / f"{self.folder.name}.zip"
        dataset = cache.metadata.dataset
        if dataset not in BENCHMARKS:
            raise UnknownNameError.of(
                "benchmark of dataset",
                dataset,
                BENCHMARKS,
                "Leave --submission out.",
            )
        self.benchmark = BENCHMARKS[dataset]
        self._labels = self._label_table()
        self._check_names(ids)
        if self.zip.exists() or (self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))):
            raise UsageError(
                f"submission {str(self.folder)!r}: it or its .zip exists already; name another folder, or remove both"
            )
        for sample_id in ids:
            self._order(sample_id)
        self._make_folder()
        if split == "test" and len(ids) != self.benchmark.test_samples:
            log.warning(
                "the test split of %s has %d samples, the cache holds %d: the server will not take this submission",
                dataset, self.benchmark.test_samples, len(ids),
            )  # fmt: skip
        if self.benchmark.inputs is not None:
            meta = {
                "use_camera": images,
                "use_lidar": True,
                "use_radar": False,
                "use_map": False,
                # A VFM was trained on more than the image-level labels that the rules count as pre-training.
                "use_external": images or pretrained,
            }
            self._write(
                self.benchmark.inputs.format(split=split), json.dumps({"meta": meta}, indent=1).encode() + b"\n"
            )

    def write(self, sample_id: str, prediction: NDArray[np.int64]) -> None:
        """Write one sample.

        Args:
            sample_id: one of the split's.
            prediction: [M] class of every point, in the cache's order.

        Raises:
            StorageError: the file cannot be written.
            CacheError: the sample cannot be read.
        """
        labels = np.empty(len(prediction), dtype=np.int64)
        labels[self._order(sample_id)] = self._labels[prediction]
        self._write(self._file(sample_id), self.benchmark.encode(labels))

    def finish(self) -> Path:
        """Pack the zip file that the server takes; returns its path. Raises `StorageError`."""
        temporary = temporary_name(self.zip)
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(self.folder.rglob("*")):
                    archive.write(path, path.relative_to(self.folder).as_posix())  # folders get entries of their own
            temporary.replace(self.zip)
        except OSError as error:
            raise StorageError(
                f"cannot write {str(self.zip)!r}: {error.strerror or error}; the predictions are in "
                f"{str(self.folder)!r}, zip its content"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return self.zip

    def _label_table(self) -> NDArray[np.int64]:
        """[K] id of each class of the cache, whatever their order."""
        have, want = self.cache.metadata.class_names, self.benchmark.labels
        if set(have) != set(want):
            lacking, foreign = sorted(set(want) - set(have)), sorted(set(have) - set(want))
            raise MismatchError(
                f"cache {str(self.cache.paths.root)!r}: its classes are not those of the benchmark of "
                f"{self.cache.metadata.dataset!r}: expected {len(want)}, got {len(have)}; missing: "
                f"{', '.join(lacking[:5]) or 'none'}; unknown: {', '.join(foreign[:5]) or 'none'}; use a cache of the "
                "dataset with the official classes"
            )
        return np.array([want[name] for name in have], dtype=np.int64)

    def _check_names(self, ids: Sequence[str]) -> None:
        splits = self.benchmark.splits
        if splits is not None and self.split not in splits:
            raise UnknownNameError.of(f"split of the benchmark of {self.cache.metadata.dataset!r}", self.split, splits)
        for sample_id in ids:
            if not self.benchmark.sample_id.fullmatch(sample_id):
                raise DataError(
                    f"sample {sample_id!r} of dataset {self.cache.metadata.dataset!r}: the server's file names need "
                    f"ids such as {self.benchmark.example!r}; extract the dataset again from its official layout"
                )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnwritableError(f"cannot make {str(self.folder)!r}: {error.strerror or error}") from error

    def _order(self, sample_id: str) -> NDArray[np.int64]:
        """[M] position of each of the cache's points in the dataset's own order, every one of 0..M-1 once."""
        order = self.cache.read_stored(sample_id, None).source_index
        present = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
        present[order] = True
        if len(order) != len(present) or not present.all():
            # No class can be made up for a point whose place is not known.
            raise DataError(
                f"sample {sample_id!r} of cache {str(self.cache.paths.root)!r}: {int((~present).sum())} of the "
                f"dataset's {len(present)} points are not in the cache, and the server wants a label for each; "
                "extract the sample again with all of its points"
            )
        return order

    def _file(self, sample_id: str) -> str:
        return self.benchmark.file.format(*sample_id.split("/"), split=self.split)

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise StorageError(
                f"cannot write {str(path)!r}: {error.strerror or error}; mend this, then start again"
            ) from error
