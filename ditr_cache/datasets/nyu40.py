"""Tables of the NYU40 label set: benchmark classes of ScanNet and Structured3D, and those of the synthetic rooms.

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

_NOT_IN_SCANNET20: dict[int, ClassInfo] = {
    15: ClassInfo("shelves", (66, 188, 102)),
    17: ClassInfo("dresser", (140, 57, 197)),
    18: ClassInfo("pillow", (202, 185, 52)),
    19: ClassInfo("mirror", (51, 176, 203)),
    22: ClassInfo("ceiling", (78, 71, 183)),
    25: ClassInfo("television", (91, 163, 138)),
    32: ClassInfo("nightstand", (146, 111, 194)),
    35: ClassInfo("lamp", (96, 207, 209)),
    38: ClassInfo("otherstructure", (94, 106, 211)),
    40: ClassInfo("otherprop", (100, 85, 144)),
}

STRUCTURED3D25: dict[int, ClassInfo] = {
    i: (SCANNET20 | _NOT_IN_SCANNET20)[i]
    for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17, 18, 19, 22, 24, 25, 32, 34, 35, 38, 39, 40)
}
"""NYU40 id -> class of Structured3D (those of the 40 that Swin3D and Pointcept keep), by label indices 0..24."""


def nyu40_to_index(label: NDArray[Any], classes: Mapping[int, ClassInfo]) -> NDArray[np.int16]:
    """[N] int16 indices into `classes` of [N] NYU40 ids; `IGNORE_INDEX` for every id that is not among them."""
    table = np.full(max(classes) + 2, IGNORE_INDEX, dtype=np.int16)
    for index, nyu40_id in enumerate(classes):
        table[nyu40_id] = index
    known = (label >= 0) & (label < len(table))
    return table[np.where(known, label, len(table) - 1).astype(np.intp)]
