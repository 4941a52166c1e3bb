"""Read by each Python that a test starts: a third of what it takes to load MLflow is the search for
garbage that is not there, and a suite starts hundreds."""

import atexit
import gc

import unsynced  # noqa: F401

gc.set_threshold(50_000, 10, 10)
atexit.register(gc.freeze)
