"""ScanNet200: the scans of ScanNet v2 with the 200 classes of the long-tailed benchmark.

The layout is that of `scannet.dataset`, but for `<id>_vh_clean_2.labels.ply`, which knows no such classes: the objects
and the label table have to be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ditr_cache.datasets.base import ClassInfo, Need
from ditr_cache.datasets.meshes import ReadLabels
from ditr_cache.datasets.scannet.annotation import AGGREGATION, LABEL_TABLE, SEGMENTS
from ditr_cache.datasets.scannet.dataset import (
    FRAME_NEEDS,
    MESH_NEED,
    OBJECT_NEEDS,
    TEST_NEED,
    ScanNetDataset,
    released_file,
)
from ditr_cache.datasets.scannet.scannet200_labels import SCANNET200
from ditr_cache.errors import MissingDataError


class ScanNet200Dataset(ScanNetDataset):
    """ScanNet v2 with the 200 classes of the ScanNet200 benchmark, in groups head, common and tail.

    Args:
        root: folder that holds `scans/`, the label table and, where downloaded, `scans_test/`. Scans may be missing.

    Raises:
        MissingDataError: no scans, or scans with labels and no label table.
        DataError: the label table cannot be used.
    """

    name: ClassVar[str] = "scannet200"
    title: ClassVar[str] = "ScanNet v2, the 200 classes of the ScanNet200 benchmark"
    needs: ClassVar[tuple[Need, ...]] = (MESH_NEED, *OBJECT_NEEDS, *FRAME_NEEDS, TEST_NEED)
    class_table: ClassVar[Mapping[int, ClassInfo]] = SCANNET200
    label_column: ClassVar[str] = "id"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if self._table is None and any(ids for split, ids in self.ids.items() if split != "test"):
            raise MissingDataError(
                f"dataset {self.name!r}: no {LABEL_TABLE} in {str(root)!r}, which says what class an object is of; "
                "download it with ScanNet's script (--label_map)"
            )

    def _labels(self, scan: Path, *, annotated: bool) -> ReadLabels | None:
        """See `ScanNetDataset`."""
        if self._table is None or not (annotated or (scan / f"{scan.name}{AGGREGATION}").is_file()):
            return None
        for suffix in (AGGREGATION, SEGMENTS):
            released_file(scan, suffix)
        return super()._labels(scan, annotated=annotated)
