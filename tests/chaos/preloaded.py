"""Imported once by the process that forks off dask workers: they begin with all of it, and traced."""

import traced_work  # noqa: F401
from forked_runs import import_everything

import_everything()
