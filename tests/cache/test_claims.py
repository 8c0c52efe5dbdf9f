"""Claims: one owner, taken over when the owner is gone, whatever the clocks say; and two runs on one cache."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditr_cache import claims as claims_module
from ditr_cache.claims import STALE_SECONDS, Claims, TakenOverError
from ditr_cache.files import Paths, location


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_beats_after_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Claims that a test leaves held, as one who was killed does, change the disk under no later test."""
    taken: list[Claims] = []
    take = Claims.take

    def noted(self: Claims, name: str) -> bool:
        taken.append(self)
        return take(self, name)

    monkeypatch.setattr(Claims, "take", noted)
    yield
    for claims in taken:
        with claims._lock:
            claims._held.clear()


@pytest.fixture(params=["disk", "memory"])
def paths(request: pytest.FixtureRequest, tmp_path: Path) -> Paths:
    url = str(tmp_path) if request.param == "disk" else f"memory://claims{tmp_path}"
    return Paths(location(url))


def of_another_host(paths: Paths, run: str, monkeypatch: pytest.MonkeyPatch) -> Claims:
    """Claims of a process that this one cannot look at."""
    other = Claims(paths, run)
    content = other._content
    monkeypatch.setattr(
        other, "_content", lambda beat: json.dumps({**json.loads(content(beat)), "host": "elsewhere"}).encode()
    )
    return other


def test_a_claim_has_one_owner(paths: Paths) -> None:
    first, second = Claims(paths, "a"), Claims(paths, "b")
    with first.hold("features/vfm/room") as mine:
        assert mine and not second.take("features/vfm/room") and not second.is_free("features/vfm/room")
        assert second.owners("features/vfm") == first.owners("features/vfm") or second.owners("features/vfm")
        assert second.take("features/vfm/other room")
        first.check("features/vfm/room")
        with pytest.raises(TakenOverError):
            first.check("features/vfm/other room")
    assert second.is_free("features/vfm/room") and second.take("features/vfm/room")
    second.release("features/vfm/room")
    second.release("features/vfm/other room")
    assert second.owners("") == []


def test_workers_of_a_run_take_over_from_each_other(paths: Paths) -> None:
    """Their executor says who works: a partition of a worker that was lost is begun again at once."""
    assert Claims(paths, "run").take("p") and Claims(paths, "run").take("p")


def test_a_claim_of_a_process_that_is_gone_is_free(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: int(gone.stdout))
        Claims(paths, "killed").take("p")
    later = Claims(paths, "later")
    assert later.is_free("p") and later.take("p")
    later.check("p")


def test_a_claim_without_beats_becomes_free(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clocks of hosts and of the file system say: the observer's own steady clock counts."""
    clock = Clock()
    other, mine = of_another_host(paths, "other", monkeypatch), Claims(paths, "mine", clock=clock)
    assert other.take("p") and not mine.take("p")
    for beat in range(3):  # it beats: however late it is
        clock.now += 10 * STALE_SECONDS
        claims_module._replace(other._path("p"), other._content(beat), other._content(beat + 1))
        assert not mine.is_free("p") and not mine.take("p")
    clock.now += STALE_SECONDS
    assert not mine.is_free("p")
    clock.now += 1
    assert mine.is_free("p") and mine.take("p")
    with pytest.raises(TakenOverError):
        other.check("p")
    other.release("p")  # takes nothing away from the new owner
    mine.check("p")


def test_beats_are_written_while_a_claim_is_held(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_SECONDS", 0.001)
    beaten = threading.Event()
    mine = Claims(paths, "mine")
    replaced = claims_module._replace

    def noting(path: object, old: bytes, new: bytes) -> None:
        replaced(path, old, new)  # type: ignore[arg-type]
        if json.loads(new)["beat"] >= 3:
            beaten.set()

    monkeypatch.setattr(claims_module, "_replace", noting)
    with mine.hold("p"):
        assert beaten.wait(20)
        mine.check("p")
    assert mine.is_free("p")


def test_half_written_claims_are_stale_in_a_minute(paths: Paths) -> None:
    clock = Clock()
    mine = Claims(paths, "mine", clock=clock)
    mine.take("other")  # makes the folder
    path = mine._path("p")
    path.write_bytes(b'{"run": "ab')
    assert not mine.take("p")
    clock.now += STALE_SECONDS + 1
    assert mine.take("p")


def test_of_many_one_wins(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    for turn in range(20):
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda i, n=turn: Claims(paths, f"run{i}").take(f"p{n}"), range(8)))
        assert sum(taken) == 1


@pytest.mark.parametrize("name", ["a/../../b", "..", "/etc/passwd", "x" * 300, "vfm", "ümlaut\n"])
def test_odd_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    mine = Claims(Paths(tmp_path / "cache"), "mine")
    with mine.hold(name) as held:
        assert held and len(list((tmp_path / "cache" / ".claims").iterdir())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
