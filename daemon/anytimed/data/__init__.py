"""Records to batches. In the order of a record's way: `mixture` draws a source, `holdout` may keep the record back,
`packer` cuts tokens into sequences, `shuffle` permutes a block of them, `pipeline` joins these into batches that carry
their position (`position` says what a position is made of), and `reader` runs the pipeline ahead of the learner.
"""
