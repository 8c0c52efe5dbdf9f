"""The classes of ScanNet200, by their `id` in ScanNet's label table.

Those of `scannet200.tsv` are those of `scannet200_constants.py` and `scannet200_splits.py`
(`BenchmarkScripts/ScanNet200` of https://github.com/ScanNet/ScanNet).
"""

from __future__ import annotations

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.datasets.shipped import row_color, shipped_rows

SCANNET200: dict[int, ClassInfo] = {
    int(row["id"]): ClassInfo(row["name"], row_color(row), row["group"])
    for row in shipped_rows("scannet", "scannet200.tsv")
}
"""Id of the label table -> class of the benchmark, in the order of its label indices 0..199; groups are head, common
and tail."""
