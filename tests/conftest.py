"""One thread a worker: the tests run in parallel, and bit-for-bit comparisons need a fixed number of threads. The list
of the injected faults ends every run that injected some. Hypothesis measures no time. What a shell's background job
ignores, the processes of the tests do not."""

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test &` in a script ignores these two, and so would every process that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

pytest_plugins = ["tests.faultlog"]

# How long an example takes says something about the machine, and decides nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
