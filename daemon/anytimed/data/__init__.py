"""Records to batches. In the order of a record's way: `mixture` draws a source among those that `sources` keeps, a
`cursor` reads it ahead and hands its texts to `tokenizing`, `holdout` may keep the record back, `packer` cuts tokens
into sequences, `shuffle` permutes a block of them, `blocks` gives them out as batches that carry their position, and
`pipeline` joins all this (`position` says which decisions of the journal are in effect). `reader` runs the pipeline
ahead of the learner.
"""
