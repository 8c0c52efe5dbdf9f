"""ScanNet200: the scans of ScanNet v2 with the 200 classes of the long-tailed benchmark.

The layout is that of `scannet.dataset`, and of a scan are read in place of its `_vh_clean_2.labels.ply`:

```
ROOT/scannetv2-labels.combined.tsv                                                    the label table, for all scans
ROOT/scans/<id>/<id>.aggregation.json  <id>_vh_clean_2.0.010000.segs.json             objects, segments
```

`<id>_vh_clean.aggregation.json` and `<id>_vh_clean.segs.json` are of the high-resolution mesh and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

from ditr_cache.datasets.base import ClassInfo, Need
from ditr_cache.datasets.scannet.dataset import ReadLabels, ScanNetDataset, released_file
from ditr_cache.datasets.scannet.scannet200_labels import (
    AGGREGATION,
    LABEL_TABLE,
    SCANNET200,
    SEGMENTS,
    read_annotation,
    read_label_table,
)
from ditr_cache.errors import MissingDataError

_TABLE_FOLDERS = (".", "tasks", "meta_data", "scans")


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
    needs: ClassVar[tuple[Need, ...]] = (
        Need("scans/<id>/<id>_vh_clean_2.ply", "points, colour, mesh", "download-scannet.py --type _vh_clean_2.ply"),
        Need("scans/<id>/<id>.aggregation.json", "objects", "download-scannet.py --type .aggregation.json"),
        Need(
            "scans/<id>/<id>_vh_clean_2.0.010000.segs.json",
            "segments that objects are made of",
            "download-scannet.py --type _vh_clean_2.0.010000.segs.json",
        ),
        Need("scannetv2-labels.combined.tsv", "categories of objects -> classes", "download-scannet.py --label_map"),
        *(need for need in ScanNetDataset.needs if ".ply" not in need.path),
    )
    class_table: ClassVar[Mapping[int, ClassInfo]] = SCANNET200

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        places = [root / folder / LABEL_TABLE for folder in _TABLE_FOLDERS]
        self._table = next((path for path in places if path.is_file()), None)
        if self._table is None and any(ids for split, ids in self._ids.items() if split != "test"):
            raise MissingDataError(
                f"dataset {self.name!r}: no {LABEL_TABLE} in {str(root)!r}, which says what class an object is of; "
                "download it with ScanNet's script (--label_map)"
            )
        self._category_ids = {} if self._table is None else read_label_table(self._table)

    def _labels(self, scan: Path, *, annotated: bool) -> ReadLabels | None:
        """See `ScanNetDataset`."""
        if self._table is None or not (annotated or (scan / f"{scan.name}{AGGREGATION}").is_file()):
            return None
        aggregation, segments = released_file(scan, AGGREGATION), released_file(scan, SEGMENTS)
        return partial(read_annotation, aggregation, segments, self._table, self._category_ids)
