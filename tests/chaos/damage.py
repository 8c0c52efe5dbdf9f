"""Files of a finished cache that are torn, flipped, lost, doubled and swapped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from table import Row
from verdict import Truth, Verdict, judge

Change = Callable[[Path, np.random.Generator], None]


def kind_of(name: str) -> str:
    """What a file of a cache is, by its path below the root."""
    parts = name.split("/")
    if parts[0] == ".claims":
        return "claim"
    if parts[-1].startswith("."):
        return "temporary"
    if name.endswith(".zarr.zip"):
        return f"{parts[0]} pack"
    if parts[-1] == "zarr.json":
        return "zarr.json of a group" if parts[-2].endswith(".zarr") else "zarr.json of an array"
    if "c" in parts[2:]:
        return f"{parts[0]} chunks"
    return {"cache.json": "cache.json", "vfm.json": "vfm.json", "codec.json": "codec.json"}.get(
        parts[-1], f"{parts[0]} record"
    )


def _rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def flip_bit(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    _rewrite(path, bytes(content))


def tear(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    _rewrite(path, content[: int(rng.integers(len(content)))])


def zero_tail(path: Path, rng: np.random.Generator) -> None:
    """As after a power cut, where the length of a file reached the disk but not all of its blocks."""
    content = path.read_bytes()
    keep = int(rng.integers(len(content)))
    _rewrite(path, content[:keep] + bytes(len(content) - keep))


def zero_middle(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    count = min(int(rng.integers(1, 512)), len(content) - start)
    content[start : start + count] = bytes(count)
    _rewrite(path, bytes(content))


def empty(path: Path, rng: np.random.Generator) -> None:
    _rewrite(path, b"")


def lose(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def append(path: Path, rng: np.random.Generator) -> None:
    _rewrite(path, path.read_bytes() + rng.bytes(int(rng.integers(1, 64))))


def noise(path: Path, rng: np.random.Generator) -> None:
    _rewrite(path, rng.bytes(len(path.read_bytes())))


CHANGES: dict[str, Change] = {
    "bit flipped": flip_bit,
    "torn": tear,
    "tail zeroed": zero_tail,
    "middle zeroed": zero_middle,
    "emptied": empty,
    "lost": lose,
    "appended to": append,
    "noise": noise,
}


@dataclass
class Damager:
    """Damages a finished cache, one thing at a time, and puts it right again.

    Args:
        cache: its root.
        truth: what it gives.
        rng: draws what is damaged.
        claims: leave some files of a run that is gone there.
    """

    cache: Path
    truth: Truth
    rng: np.random.Generator

    def files(self) -> dict[str, list[Path]]:
        """All files, by kind."""
        found: dict[str, list[Path]] = {}
        for path in sorted(p for p in self.cache.rglob("*") if p.is_file()):
            found.setdefault(kind_of(path.relative_to(self.cache).as_posix()), []).append(path)
        return found

    def changed(self, label: str, trials: int) -> Iterator[Row]:
        """A row for every kind of change, of so many files of all kinds in turn."""
        files = sorted(self.files().items())
        turn = 0
        for name, change in CHANGES.items():
            row = Row(f"{label}{name}")
            while row.trials < trials:
                kind, paths = files[turn % len(files)]
                turn += 1
                path = paths[int(self.rng.integers(len(paths)))]
                content = path.read_bytes()
                change(path, self.rng)
                try:
                    verdict = judge(self.cache, self.truth)
                    same = path.exists() and path.read_bytes() == content
                finally:
                    path.write_bytes(content)
                # A partition without its record is none, and nothing that is damaged.
                committed = name != "lost" or kind not in ("geometry record", "features record")
                self.note(row, verdict, f"{kind} {path.relative_to(self.cache)}", same, committed)
            yield row

    def swapped(self, label: str, trials: int) -> Iterator[Row]:
        """Files that are each whole, but in each other's place; of the same size where there are such."""
        everything = [(kind, p) for kind, paths in self.files().items() for p in paths if p.stat().st_size]
        for name, pairs in (("swapped, same size", True), ("swapped, any size", False)):
            row = Row(f"{label}{name}")
            candidates = [
                (a, b)
                for i, (kind, a) in enumerate(everything)
                for other, b in everything[:i]
                if kind == other and (a.stat().st_size == b.stat().st_size) == pairs
            ]
            order = self.rng.permutation(len(candidates))[:trials]
            for a, b in (candidates[int(i)] for i in order):
                before = a.read_bytes(), b.read_bytes()
                a.write_bytes(before[1])
                b.write_bytes(before[0])
                try:
                    verdict = judge(self.cache, self.truth)
                finally:
                    a.write_bytes(before[0])
                    b.write_bytes(before[1])
                where = f"{a.relative_to(self.cache)} and {b.relative_to(self.cache)}"
                self.note(row, verdict, where, before[0] == before[1], True)
            yield row

    def folders_swapped(self, label: str, trials: int) -> Row:
        """Whole groups of arrays, and whole arrays, in each other's place."""
        row = Row(f"{label}folders swapped")
        groups = sorted(p.parent for p in self.cache.rglob("zarr.json"))
        pairs = [(a, b) for i, a in enumerate(groups) for b in groups[:i] if a not in b.parents and b not in a.parents]
        alike = [
            (a, b) for a, b in pairs if a.name == b.name or (a.name.endswith(".zarr") and b.name.endswith(".zarr"))
        ]
        for i in self.rng.permutation(len(alike))[:trials]:
            a, b = alike[int(i)]
            same = contents(a) == contents(b)
            exchange(a, b)
            try:
                verdict = judge(self.cache, self.truth)
            finally:
                exchange(a, b)
            self.note(row, verdict, f"{a.relative_to(self.cache)} and {b.relative_to(self.cache)}", same, True)
        return row

    def doubled(self, label: str, trials: int) -> Row:
        """A copy of a file under a name beside it that nothing has, or over that of a neighbour."""
        row = Row(f"{label}doubled")
        files = [p for paths in self.files().values() for p in paths]
        for _ in range(trials):
            path = files[int(self.rng.integers(len(files)))]
            others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
            target = path.with_name(f"copy-{path.name}")
            if others and self.rng.random() < 0.5:
                target = others[int(self.rng.integers(len(others)))]
            before = target.read_bytes() if target.exists() else None
            shutil.copyfile(path, target)
            same = before is None or before == path.read_bytes()
            try:
                verdict = judge(self.cache, self.truth)
            finally:
                target.unlink() if before is None else target.write_bytes(before)
            self.note(row, verdict, f"{path.relative_to(self.cache)} as {target.name}", same, True)
        return row

    def note(self, row: Row, verdict: Verdict, what: str, same: bool, committed: bool) -> None:
        """Count one trial.

        Args:
            row: that it belongs to.
            verdict: of the damaged cache.
            what: was damaged.
            same: the damage changed nothing.
            committed: what was damaged still counts as committed: `verify` must tell where a reader refuses.
        """
        row.trials += 1
        row.found += verdict.found
        row.refused += bool(verdict.refused)
        row.harmless += not verdict.found and not verdict.refused and not verdict.silent
        for text in verdict.silent:
            row.silent.append(f"{what}: {text}")
        if verdict.refused and not verdict.found and committed and not same:
            row.silent.append(f"{what}: verify says clean, but a reader refuses: {verdict.refused[0]}")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def exchange(a: Path, b: Path) -> None:
    """Two folders take each other's place."""
    aside = a.with_name(".exchanged.tmp")
    os.rename(a, aside)  # noqa: PTH104  quicker to read beside the next line
    b.rename(a)
    aside.rename(b)
