"""One thread a worker: the tests run in parallel, and bit-for-bit comparisons need a fixed number of threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
