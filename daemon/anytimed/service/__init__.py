"""The daemon. In the order of a run: `assembly` makes parts of a configuration, `recovery` brings a run back, `loop`
trains until told to stop, asked by what `signals`, `timetable` and `control` post (`requests`), served by the threads
of `committer` and `outbox`, and seen through `board`, `console`, `metrics` and `systemd`. `check` and `reload` look at
configurations; `reader_side` loads what was published; `prove` runs a configuration twice, once with a `victim`, and
`sameness` compares the two."""
