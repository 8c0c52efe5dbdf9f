from __future__ import annotations

import io

from rich.console import Console

from ditr_train.progress import SampleProgress


def shown(progress: SampleProgress, output: io.StringIO) -> str:
    with progress:
        for _ in range(progress.total):
            progress.advance()
    return output.getvalue()


def test_short_work_says_nothing_without_a_terminal() -> None:
    output = io.StringIO()
    assert shown(SampleProgress("evaluating val", 3, console=Console(file=output)), output) == ""


def test_long_work_says_how_far_how_fast_and_how_long() -> None:
    output = io.StringIO()
    lines = shown(SampleProgress("evaluating val", 2, console=Console(file=output, width=40), every=0), output)
    first, last = lines.splitlines()
    assert first.startswith("evaluating val  1/2  ") and "samples/s" in first and first.endswith("s left")
    assert last.startswith("evaluating val  2/2  ") and last.endswith("  0 s left")


def test_a_terminal_gets_a_bar() -> None:
    output = io.StringIO()
    text = shown(SampleProgress("evaluating [a]{b}", 2, console=Console(file=output, force_terminal=True)), output)
    assert "evaluating [a]{b}" in text and "2/2" in text and "samples/s" in text


def test_quiet() -> None:
    output = io.StringIO()
    progress = SampleProgress("x", 2, enabled=False, console=Console(file=output, force_terminal=True), every=0)
    assert shown(progress, output) == ""
