"""What all tests share: few threads, deterministic hypothesis, and the folder of real captures."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch and numpy are imported: many small operations on shared cores run slower with more threads.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real captures: DITR_REALDATA, by default ../shared/realdata. Skips the test where there is none."""
    default = Path(__file__).parents[1] / "../shared/realdata"
    folder = Path(os.environ.get("DITR_REALDATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real captures at {folder}: set DITR_REALDATA")
    return folder
