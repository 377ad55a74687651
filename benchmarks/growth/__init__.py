"""The parts of `benchmarks/stream_growth.py`: the shards and the history of a run, and the processes that measure."""
