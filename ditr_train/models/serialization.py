"""Space-filling curves through voxels: a curve turns the voxels of a sample into a sequence whose neighbours are near.

Four curves: Morton's z curve, Hilbert's, and both with the first two axes exchanged. A code is `batch << 48 | place on
the curve`, so that sorting codes lists the samples one after the other. The Hilbert curve is Skilling's (J. Skilling,
Programming the Hilbert curve, 2004), which Point Transformer V3 was published with; it is read here from the digits of
the Morton code by a finite automaton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ditr_train.models.grid_hierarchy import morton_keys

_LEVELS = 16
_STEP = 2  # octree levels that the automaton reads at a time
_DIGITS = 8**_STEP
# The columns of the sites (batch, x, y, z) from the slowest axis of the Morton code to the fastest.
_AXES = {"z": (1, 2, 3), "z-trans": (2, 1, 3), "hilbert": (1, 2, 3), "hilbert-trans": (2, 1, 3)}

# A curve's state inside an octree cell: effective bit i is `bits[axis[i]] ^ flip[i]`, parity that of all bits so far.
_State = tuple[tuple[int, int, int], tuple[int, int, int], int]


def curve_codes(sites: Tensor, curves: Sequence[str], depth: Tensor) -> Tensor:
    """Codes of voxels, one row for each curve.

    Args:
        sites: [M, 4] integer (batch, and three coordinates in [0, 2^16)).
        curves: of "z", "z-trans", "hilbert", "hilbert-trans".
        depth: [M] int64, the Hilbert curve fills the cube of edge 2^depth; the same for all voxels of a sample. A
            cube of another depth is passed in another direction, so that the order of the voxels depends on it.

    Returns:
        [len(curves), M] int64, unique for the unique voxels of one curve. `code >> 3` is the code of the enclosing
        voxel for `depth - 1`, its batch 45 bits up.

    Raises:
        DataError: coordinates or batches beyond the codes' range (seen on the CPU only).
    """
    morton = {axes: morton_keys(sites[:, (0, *reversed(axes))]) for axes in {_AXES[curve] for curve in curves}}
    codes = [_hilbert(morton[_AXES[c]], depth) if c.startswith("hilbert") else morton[_AXES[c]] for c in curves]
    return torch.stack(codes)


def cube_depth(edge: Tensor) -> Tensor:
    """Bits that count up to `edge`: the depth that the published networks give a cube of highest coordinate edge - 1.

    Args:
        edge: integer, in [0, 2^16].

    Returns:
        int64 of the same shape.
    """
    powers = 1 << torch.arange(_LEVELS + 1, device=edge.device)
    return (edge[..., None] >= powers).sum(dim=-1)


def invert(order: Tensor) -> Tensor:
    """The inverse [M] of a permutation [M] int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _hilbert(keys: Tensor, depth: Tensor) -> Tensor:
    """Codes [M] along the Hilbert curve, from Morton keys with the batch in the upper bits."""
    table, starts = _automaton(keys.device)
    # Levels above the cube hold zeros only; three of them turn the curve once around its diagonal.
    state = starts[(_LEVELS - depth) % 3]
    codes = keys >> 3 * _LEVELS
    for shift in reversed(range(0, 3 * _LEVELS, 3 * _STEP)):
        entry = table[state | (keys >> shift & (_DIGITS - 1))]
        state = entry & -_DIGITS
        codes = codes << 3 * _STEP | (entry - state)
    return codes


@functools.cache
def _automaton(device: torch.device) -> tuple[Tensor, Tensor]:
    """Table [S * 64] int64 of `next state | digits of the code`, by state (a multiple of 64) and digits of the key.

    Second, the states [3] from which 0, 1 and 2 levels of zeros lead to the curve's own beginning.
    """
    begin: _State = ((0, 1, 2), (0, 0, 0), 0)
    number = {begin: 0}
    reached = [begin]
    table: list[int] = []
    for state in reached:  # grows while it is read
        for digits in range(_DIGITS):
            after, code = state, 0
            for level in reversed(range(_STEP)):
                after, digit = _descend(after, digits >> 3 * level & 7)
                code = code << 3 | digit
            if after not in number:
                number[after] = len(reached)
                reached.append(after)
            table.append(number[after] * _DIGITS | code)
    once = _descend(begin, 0)[0]
    starts = [number[state] * _DIGITS for state in (begin, _descend(once, 0)[0], once)]
    return torch.tensor(table, device=device), torch.tensor(starts, device=device)


def _descend(state: _State, digit: int) -> tuple[_State, int]:
    """The state inside the child cell `digit` (x is its highest bit), and that child's place along the curve."""
    axis, flip, parity = list(state[0]), list(state[1]), state[2]
    bits = [digit >> (2 - axis[i]) & 1 ^ flip[i] for i in range(3)]
    place = 0
    for i, bit in enumerate(bits):
        parity ^= bit  # from Gray code to binary
        place = place << 1 | parity
        if bit:
            flip[0] ^= 1
        else:
            axis[0], axis[i] = axis[i], axis[0]
            flip[0], flip[i] = flip[i], flip[0]
    return ((axis[0], axis[1], axis[2]), (flip[0], flip[1], flip[2]), parity), place
