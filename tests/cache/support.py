"""What several tests of the cache do: call the command line in this process, compare caches array by array."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache import cli, open_cache
from ditr_cache.arrays import ArrayGroup
from ditr_cache.schema import ArrayInfo


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout: a second one, or any other text, fails."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


def call_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    *arguments: object,
) -> Outcome:
    """`ditr-cache ARGUMENTS` in this process; no traceback is ever shown or logged."""
    monkeypatch.setattr(sys, "argv", ["ditr-cache", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err + caplog.text
    return Outcome(code, out, err)


def read_array(folder: Path, name: str, info: ArrayInfo, rows: slice = slice(None)) -> NDArray[Any]:
    """Rows of one array of a group."""
    return ArrayGroup(str(folder), {name: info}).read(name, rows)


def contents(cache: Path) -> dict[str, NDArray[Any]]:
    """Every array of every committed partition."""
    reader = open_cache(cache)
    found = {}
    for partition, record in reader.geometry.items():
        folders = {reader.paths.geometry: record.arrays}
        for spec in reader.vfms.values():
            features = reader.feature_record(spec, partition)
            if features is not None:
                folders[reader.paths.features(spec.key)] = features.arrays
        for folder, arrays in folders.items():
            for name, info in arrays.items():
                where = reader.paths.arrays(folder, partition)
                found[f"{(where / name).relative_to(cache)}"] = read_array(where, name, info)
    return found


def assert_same(first: Path, second: Path) -> None:
    """Two caches hold the same arrays, bit by bit, under the same digests."""
    a, b = contents(first), contents(second)
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        np.testing.assert_array_equal(array, b[name], err_msg=name)
    digests = [{p: r.digest for p, r in open_cache(cache).geometry.items()} for cache in (first, second)]
    assert digests[0] == digests[1]
