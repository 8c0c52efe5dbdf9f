"""Seconds per stage, and the Chrome trace of them."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditr_cache import timeline
from ditr_cache.errors import StorageError
from ditr_cache.timeline import STAGES, ChromeTrace, Span, Timeline, describe_stages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nanoseconds that the timeline reads; the test sets them."""
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    return now


def seconds(line: Timeline) -> dict[str, float]:
    """Of stages that took any time."""
    return {name: value for name, value in line.seconds.items() if value}


def test_seconds_add_up_per_stage(clock: list[int]) -> None:
    line = Timeline()
    for _ in range(3):
        with line.stage("decode"):
            clock[0] += 2_000_000_000
    with pytest.raises(ValueError, match="damaged"), line.stage("read"):
        clock[0] += 500_000_000
        raise ValueError("damaged")
    assert list(line.seconds) == list(STAGES)
    assert seconds(line) == pytest.approx({"decode": 6.0, "read": 0.5})
    assert line.spans == ()


def test_items_of_a_lazy_iterable_are_timed_apart_from_what_is_done_with_them(clock: list[int]) -> None:
    def blocks() -> Iterator[int]:
        for i in range(3):
            clock[0] += 1_000_000_000
            yield i

    line = Timeline(keep_spans=True)
    for _ in line.each("lift", blocks()):
        with line.stage("encode"):
            clock[0] += 10_000_000_000
    assert seconds(line) == pytest.approx({"lift": 3.0, "encode": 30.0})
    assert [span.stage for span in line.spans] == ["lift", "encode"] * 3 + ["lift"]


def test_a_shared_stretch_counts_in_part() -> None:
    ours, theirs = Timeline(keep_spans=True), Timeline(keep_spans=True)
    ours.add("forward", 0, 4_000_000_000, share=0.75)
    theirs.add("forward", 0, 4_000_000_000, share=0.25, span=False)
    assert (seconds(ours), seconds(theirs)) == ({"forward": 3.0}, {"forward": 1.0})
    assert (len(ours.spans), len(theirs.spans)) == (1, 0)


def test_spans_name_their_thread_and_stand_on_one_clock() -> None:
    line = Timeline(keep_spans=True)
    before = time.time_ns()

    def work() -> None:
        with line.stage("decode"):
            time.sleep(0.01)

    thread = threading.Thread(target=work, name="decode_0")
    thread.start()
    thread.join()
    (span,) = line.spans
    assert (span.stage, span.thread) == ("decode", "decode_0")
    assert span.end - span.start >= 10_000_000
    slack = 1_000_000_000  # the two clocks may drift, and one may be set
    assert before - slack <= span.start and span.end <= time.time_ns() + slack
    assert pickle.loads(pickle.dumps(line.spans)) == line.spans


def test_spans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SPANS", 10)
    line = Timeline(keep_spans=True)
    for _ in range(25):
        line.add("decode", 0, 1_000_000_000)
    assert len(line.spans) == 10
    assert line.seconds["decode"] == pytest.approx(25)


def test_the_line_of_the_log_tells_the_share_of_the_forward_pass() -> None:
    text = describe_stages({"forward": 8.0, "decode": 1.26}, wall=5.0, workers=2)
    assert text == (
        "seconds per stage: read 0.0, link 0.0, decode 1.3, resize 0.0, forward 8.0, lift 0.0, encode 0.0, write 0.0; "
        "forward 80% of 5.0 s"
    )


# --- the trace ------------------------------------------------------------------------------------------------------


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def test_a_trace_has_complete_events_in_microseconds_under_named_processes_and_threads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with ChromeTrace(path) as trace:
        trace.add("a:1", "room", [Span("decode", "decode_0", 5_000, 7_500), Span("forward", "forward_0", 8_000, 9_000)])
        trace.add("b:1", "hall", [Span("decode", "decode_0", 6_000, 6_000)])
        trace.add("a:1", "attic", [Span("write", "decode_0", 10_000, 12_000)])
        trace.add("a:1", "reused", [])
    found = events(path)
    spans = [event for event in found if event["ph"] == "X"]
    names = {(e["name"], e["pid"], e.get("tid")): e["args"]["name"] for e in found if e["ph"] == "M"}
    assert [(e["name"], e["ts"], e["dur"], e["args"]["partition"]) for e in spans] == [
        ("decode", 5, 2.5, "room"),
        ("forward", 8, 1, "room"),
        ("decode", 6, 0, "hall"),
        ("write", 10, 2, "attic"),
    ]
    assert all(type(event[key]) is int for event in spans for key in ("pid", "tid"))
    assert [names["process_name", e["pid"], None] for e in spans] == ["a:1", "a:1", "b:1", "a:1"]
    assert [names["thread_name", e["pid"], e["tid"]] for e in spans] == [
        "decode_0",
        "forward_0",
        "decode_0",
        "decode_0",
    ]
    assert len(names) == 2 + 3


def test_a_trace_is_whole_however_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ChromeTrace(tmp_path / "cut.json") as trace:
        trace.add("a:1", "room", [Span("read", "partition_0", 0, 1)])
        raise KeyboardInterrupt
    assert [e["name"] for e in events(tmp_path / "cut.json")] == ["process_name", "thread_name", "read"]
    with ChromeTrace(tmp_path / "empty.json"):
        pass
    assert events(tmp_path / "empty.json") == []


def test_a_trace_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "trace.json"
    with pytest.raises(StorageError, match=r"cannot write .*absent/trace\.json"):
        ChromeTrace(path)
