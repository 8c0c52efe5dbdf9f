import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache import lift
from ditr_cache.errors import UnknownNameError
from ditr_cache.lift import FUSE, TokenTable, every_token, fuse

CPU = torch.device("cpu")
DIM = 4


class Case:
    """Random links of several views onto a grid, tokens of every view, and which views are dropped."""

    def __init__(self, seed: int, points: int, views: int, grid: tuple[int, int], dropped: frozenset[int]) -> None:
        rng = np.random.default_rng(seed)
        self.points, self.grid, self.dropped = points, grid, dropped
        self.seen = [np.flatnonzero(rng.random(points) < rng.random()) for _ in range(views)]
        self.point = np.concatenate([*self.seen, np.zeros(0, int)]).astype(np.uint32)
        self.uv = rng.integers(0, 65536, (len(self.point), 2)).astype(np.uint16)
        # Few distinct depths, so that equally near views occur.
        self.depth = rng.choice([0.5, 1.0, 1.5, 2.0], len(self.point)).astype(np.float16)
        self.tokens = torch.from_numpy(rng.normal(size=(views, *grid, DIM)).astype(np.float32))

    def run(self, how: str) -> tuple[np.ndarray, np.ndarray, TokenTable]:
        table = self.table()
        blocks, index = fuse(table, self.point, self.depth, self.points, how)
        return np.concatenate(list(blocks)), index, table

    def table(self) -> TokenTable:
        table = TokenTable(self.uv, [len(s) for s in self.seen], self.grid, DIM, CPU)
        for i, tokens in enumerate(self.tokens):
            if i in self.dropped:
                table.drop(i)
            else:
                table.put(i, tokens)
        return table

    def plain(self, how: str) -> list[np.ndarray | None]:
        """Feature of each point, by loops over the words of the documentation."""
        sightings: list[list[tuple[float, np.ndarray]]] = [[] for _ in range(self.points)]
        link = 0
        for view, seen in enumerate(self.seen):
            for point in seen:
                column = int(self.uv[link, 0]) * self.grid[1] // 65536
                row = int(self.uv[link, 1]) * self.grid[0] // 65536
                if view not in self.dropped:
                    sightings[point].append((float(self.depth[link]), self.tokens[view, row, column].numpy()))
                link += 1
        result: list[np.ndarray | None] = []
        for found in sightings:
            if not found:
                result.append(None)
            elif how == "mean":
                result.append(np.mean([f.astype(np.float64) for _, f in found], axis=0))
            elif how == "last":
                result.append(found[-1][1])
            else:
                nearest = min(z for z, _ in found)
                result.append([f for z, f in found if z == nearest][-1])
        return result


@pytest.mark.parametrize("how", FUSE)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.integers(0, 5),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.frozensets(st.integers(0, 4)),
)
def test_fused_rows_against_plain_loops(how, seed, points, views, grid, dropped):
    case = Case(seed, points, views, grid, dropped)
    rows, index, _ = case.run(how)
    assert rows.dtype == np.float32 and index.dtype == np.int32 and index.shape == (points,)
    expected = case.plain(how)
    for point in range(points):
        if expected[point] is None:
            assert index[point] == -1
        elif how == "mean":
            assert np.allclose(rows[index[point]], expected[point], atol=1e-6)
        else:
            assert np.array_equal(rows[index[point]], expected[point])
    # Every row is used, and rows stand in the order in which points first use them.
    used = index[index >= 0]
    assert sorted(set(used.tolist())) == list(range(len(rows)))
    first = [int(np.flatnonzero(used == r)[0]) for r in range(len(rows))]
    assert first == sorted(first)


@pytest.mark.parametrize("how", ["last", "nearest"])
def test_points_on_the_same_token_share_a_row(how):
    case = Case(seed=0, points=300, views=1, grid=(2, 2), dropped=frozenset())
    rows, index, _ = case.run(how)
    assert len(rows) <= 4 < (index >= 0).sum()


def test_one_row_per_linked_token():
    """The table holds no token that no link sees, so its memory is known before the VFM runs."""
    case = Case(seed=1, points=5, views=3, grid=(50, 50), dropped=frozenset())
    _, _, table = case.run("mean")
    seen = {(v, r) for v, part in enumerate(np.split(table.link_row, np.cumsum([len(s) for s in case.seen])[:-1]))
            for r in part}  # fmt: skip
    assert len(table.rows) == len(seen) <= len(case.point)


@pytest.mark.parametrize("how", FUSE)
def test_all_views_dropped(how):
    rows, index, _ = Case(seed=2, points=20, views=2, grid=(3, 3), dropped=frozenset({0, 1})).run(how)
    assert rows.shape == (0, DIM) and (index == -1).all()


def test_mean_over_more_rows_than_one_step(monkeypatch):
    case = Case(seed=3, points=50, views=4, grid=(3, 4), dropped=frozenset({2}))
    whole = case.run("mean")
    monkeypatch.setattr(lift, "_ROWS_PER_STEP", 7)
    steps = case.run("mean")
    assert np.array_equal(whole[0], steps[0]) and np.array_equal(whole[1], steps[1])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.integers(0, 5),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.frozensets(st.integers(0, 4)),
)
def test_every_token_against_plain_loops(seed, points, views, grid, dropped):
    case = Case(seed, points, views, grid, dropped)
    blocks, index = every_token(case.table())
    rows = np.concatenate(list(blocks))
    assert rows.dtype == np.float32 and index.dtype == np.int32 and index.shape == (len(case.point),)
    named: dict[int, tuple[int, int, int]] = {}
    link = 0
    for view, seen in enumerate(case.seen):
        for _ in seen:
            row, column = (int(x) * g // 65536 for x, g in zip(case.uv[link, ::-1], grid, strict=True))
            if view in dropped:
                assert index[link] == -1
            else:
                assert np.array_equal(rows[index[link]], case.tokens[view, row, column].numpy())
                assert named.setdefault(int(index[link]), (view, row, column)) == (view, row, column)
            link += 1
    assert len(rows) == len(named) == len(set(named.values())), "every linked token once, no other"
    assert [named[i] for i in range(len(rows))] == sorted(named.values()), "views, and in them tokens, in order"


def test_unknown_fuse():
    table = TokenTable(np.zeros((0, 2), np.uint16), [], (1, 1), DIM, CPU)
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        fuse(table, np.zeros(0, np.uint32), np.zeros(0, np.float16), 3, "meen")
