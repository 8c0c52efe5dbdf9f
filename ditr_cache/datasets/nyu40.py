"""Tables of the NYU40 label set: ScanNet's benchmark classes and those of the synthetic rooms.

Ids and colours are those of ScanNet's `BenchmarkScripts` (https://github.com/ScanNet/ScanNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.base import ClassInfo
from ditr_cache.schema import IGNORE_INDEX

SCANNET20: dict[int, ClassInfo] = {
    1: ClassInfo("wall", (174, 199, 232)),
    2: ClassInfo("floor", (152, 223, 138)),
    3: ClassInfo("cabinet", (31, 119, 180)),
    4: ClassInfo("bed", (255, 187, 120)),
    5: ClassInfo("chair", (188, 189, 34)),
    6: ClassInfo("sofa", (140, 86, 75)),
    7: ClassInfo("table", (255, 152, 150)),
    8: ClassInfo("door", (214, 39, 40)),
    9: ClassInfo("window", (197, 176, 213)),
    10: ClassInfo("bookshelf", (148, 103, 189)),
    11: ClassInfo("picture", (196, 156, 148)),
    12: ClassInfo("counter", (23, 190, 207)),
    14: ClassInfo("desk", (247, 182, 210)),
    16: ClassInfo("curtain", (219, 219, 141)),
    24: ClassInfo("refrigerator", (255, 127, 14)),
    28: ClassInfo("shower curtain", (158, 218, 229)),
    33: ClassInfo("toilet", (44, 160, 44)),
    34: ClassInfo("sink", (112, 128, 144)),
    36: ClassInfo("bathtub", (227, 119, 194)),
    39: ClassInfo("otherfurniture", (82, 84, 163)),
}
"""NYU40 id -> class of the ScanNet v2 benchmark, in the order of its label indices 0..19."""

ROOMS13: dict[int, ClassInfo] = {i: SCANNET20[i] for i in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 16)} | {
    20: ClassInfo("floor mat", (200, 54, 131)),
    30: ClassInfo("whiteboard", (96, 207, 209)),
}
"""NYU40 id -> class of the synthetic rooms, in the order of their label indices 0..12."""


def nyu40_to_index(label: NDArray[Any], classes: Mapping[int, ClassInfo]) -> NDArray[np.int16]:
    """[N] int16 indices into `classes` of [N] NYU40 ids; `IGNORE_INDEX` for every id that is not among them."""
    table = np.full(max(classes) + 2, IGNORE_INDEX, dtype=np.int16)
    for index, nyu40_id in enumerate(classes):
        table[nyu40_id] = index
    known = (label >= 0) & (label < len(table))
    return table[np.where(known, label, len(table) - 1).astype(np.intp)]
