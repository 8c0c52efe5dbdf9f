"""A short form of the fuzzing, the same at every run; and that it would see what it looks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engine
from ditr_cache.errors import DataError
from engine import Target, fuzz, input_of

RUN = Path(__file__).parent / "run.py"


def test_the_readers_survive(tmp_path: Path) -> None:
    """Some hundred inputs each; whole datasets take longer, and are left to the long form."""
    names = ("cloud", "mesh", "sens", "image", "document", "rows", "depth", "classes", "checkpoint")
    command = [sys.executable, str(RUN), "--seconds", "300", "--executions", "100", "--out", str(tmp_path / "findings")]
    done = subprocess.run(
        [*command, *(word for name in names for word in ("--target", name))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" 0 findings")
    assert done.stdout.count("100 executions") >= 15


def test_caches_and_recipes_survive(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--seconds", "300", "--executions", "30", "--out", str(tmp_path / "findings")]
    command += ["--target", "store", "--target", "recipe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def fail(data: bytes) -> None:
    raise KeyError("x")


def refuse(data: bytes) -> None:
    raise DataError("not such a file")


def hide(data: bytes) -> None:
    try:
        np.ones(engine.MEMORY, np.float64)
    except MemoryError as error:
        raise DataError("damaged") from error


def take(data: bytes) -> None:
    np.zeros(engine.MEMORY + 1, np.uint8)


def hang(data: bytes) -> None:
    time.sleep(60)


def die(data: bytes) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("run", "words"),
    [(fail, "KeyError"), (hide, "DataError"), (take, "takes more than"), (hang, "HangError"), (die, "ended with 11")],
)
def test_what_must_not_happen_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[bytes], None], words: str
) -> None:
    monkeypatch.setattr(engine, "SECONDS", 0.2)

    def after_the_corpus(data: bytes) -> None:
        if data != b"valid":
            run(data)

    target = Target("planted", [b"valid"], after_the_corpus)
    done, findings = fuzz(target, seed=0, seconds=60, executions=3, scratch=tmp_path)
    assert done == 3 and findings and words in findings[0].what
    assert findings[0].data != b"valid"
    saved = findings[0].save(tmp_path / "findings")
    assert saved.read_bytes() == findings[0].data and words in saved.with_name(saved.name + ".txt").read_text()


def test_a_valid_file_that_is_refused_is_found(tmp_path: Path) -> None:
    _, findings = fuzz(Target("planted", [b"valid"], refuse), seed=0, seconds=60, executions=3, scratch=tmp_path)
    assert len(findings) == 1 and findings[0].data == b"valid"


def test_inputs_depend_on_seed_and_number_alone() -> None:
    target = Target("x", [bytes(range(200)), b'{"a": [1, 2.5, "text"], "b": null}\nline\n'], refuse, kept=1)
    first = [input_of(target, 3, number) for number in range(300)]
    assert first == [input_of(target, 3, number) for number in range(300)]
    assert first[:2] == target.corpus and len(set(first)) > 200
    assert first != [input_of(target, 4, number) for number in range(300)]
    assert {data[:1] for data in first} == {b"\0", b"{"}
