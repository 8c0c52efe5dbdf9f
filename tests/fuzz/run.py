"""Fuzz the readers: `python tests/fuzz/run.py --seconds 120`.

Each target is run in child processes with limits of time and memory; see `engine.py`. The inputs are the same for the
same `--seed`, whatever the machine; how many of them there is time for is not. Prints a line per target. Where there
are findings, their inputs are kept in `--out`, and the exit code is 1; `--reproduce FILE` runs one of them again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # each takes 64 MiB of address space, which is what is measured

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cache"), str(HERE.parents[1])]

from engine import Finding, Target, execute, fuzz  # noqa: E402
from targets import all_targets  # noqa: E402


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    parser.add_argument("--executions", type=int, default=1 << 40, help="most of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="name or start of it; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where inputs of findings are kept")
    parser.add_argument("--reproduce", type=Path, help="an input that was kept; its name tells the target")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if arguments.reproduce is not None:
            name = arguments.reproduce.name.rpartition("-")[0]
            return reproduce(arguments.reproduce, all_targets(Path(folder), (name,)))
        targets = all_targets(Path(folder), tuple(arguments.target or ("",)))
        if not targets:
            parser.error("no such target")
        return run(targets, arguments, Path(folder))


def run(targets: list[Target], arguments: argparse.Namespace, folder: Path) -> int:
    """Fuzz every target for its share of the time."""
    deadline = time.monotonic() + arguments.seconds
    total = 0
    findings: dict[str, Finding] = {}
    for number, target in enumerate(targets):
        share = max(0.0, deadline - time.monotonic()) / (len(targets) - number)
        done, found = fuzz(target, seed=arguments.seed, seconds=share, executions=arguments.executions, scratch=folder)
        total += done
        different = {f.signature: f for f in found}
        findings |= different
        print(
            f"{target.name:<24} {done:>8} executions {len(found):>4} findings, {len(different)} different", flush=True
        )
    for finding in findings.values():
        print(f"{finding.signature}\n    {finding.save(arguments.out)}")
    print(f"{len(targets)} targets, {total} executions, {len(findings)} findings")
    return 1 if findings else 0


def reproduce(path: Path, targets: list[Target]) -> int:
    """Run one input again, in this process, and tell what happens."""
    target = next(t for t in targets if path.name.startswith(f"{t.name}-"))
    what = execute(target, path.read_bytes())
    print(what or f"{target.name}: nothing that must not happen")
    return 1 if what else 0


if __name__ == "__main__":
    sys.exit(main())
