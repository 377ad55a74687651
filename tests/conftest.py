"""One thread a worker: the tests run in parallel, and bit-for-bit comparisons need a fixed number of threads. The list
of the injected faults ends every run that injected some. Hypothesis measures no time."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.faultlog"]

# How long an example takes says something about the machine, and decides nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
