"""The parts of `benchmarks/extend.py`."""
