"""The parts of `benchmarks/anytime.py`."""
