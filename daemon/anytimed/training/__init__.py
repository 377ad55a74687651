"""Model and optimizer. `learner` takes steps and gives out copies, `evaluate` computes losses at x, y and z, `device`
is the one seam between CPU and CUDA, `optimizers` turns a table into an optimizer, `footprint` counts bytes, `sample`
writes text."""
