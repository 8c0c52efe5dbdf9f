"""The figures of the suite: one row per kind of fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """What came of one kind of fault.

    Args:
        fault: its name.
        trials: how often it was tried.
        found: trials after which `verify` tells of damage.
        refused: trials after which a reader refuses, or does not offer, something.
        harmless: trials after which all is as before.
        silent: what nobody was told: wrong arrays, errors that are none of the package's, a clean `verify` of a cache
            that a reader refuses. There must be none.
        redone: most partitions of one worker that a kill cost, of those whose features were complete; None: no kills.
        more: kills that cost more than one complete partition of a worker.
        begun: most partitions of one worker that had begun when it was killed.
        completed, identical: caches that were completed afterwards, and how many of them are just the clean one.
        trouble: what else went wrong. There must be none.
    """

    fault: str
    trials: int = 0
    found: int = 0
    refused: int = 0
    harmless: int = 0
    silent: list[str] = field(default_factory=list)
    redone: int | None = None
    more: int = 0
    begun: int | None = None
    completed: int = 0
    identical: int = 0
    trouble: list[str] = field(default_factory=list)

    def cost(self, complete: int, begun: int) -> None:
        """Note what a kill cost: complete partitions, and begun ones, of the worker that it cost most."""
        self.redone, self.begun = max(self.redone or 0, complete), max(self.begun or 0, begun)
        self.more += complete > 1

    @property
    def ok(self) -> bool:
        """Whether everything that is required holds."""
        right = not self.silent and not self.trouble and self.identical == self.completed
        return right and (self.redone or 0) <= 1


HEAD = ("fault", "trials", "found", "refused", "harmless", "silent", "redone", "begun", "identical")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    kills = ["" if count is None else str(count) for count in (row.redone, row.begun)]
    identical = f"{row.identical} of {row.completed}" if row.completed else ""
    counts = [str(n) for n in (row.trials, row.found, row.refused, row.harmless, len(row.silent))]
    return (row.fault, *counts, *kills, identical)


def print_table(rows: Sequence[Row]) -> bool:
    """Print all rows, and below them what is wrong; whether nothing is."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    for line in lines:
        print("  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))))
    for row in rows:
        for text in [*row.silent[:8], *row.trouble[:8]]:
            print(f"{row.fault}: {text}")
        if row.identical < row.completed:
            print(f"{row.fault}: {row.completed - row.identical} completed caches differ from the clean one")
        if row.more:
            print(f"{row.fault}: {row.more} of {row.trials} kills cost a worker up to {row.redone} complete partitions")
    return all(row.ok for row in rows)
