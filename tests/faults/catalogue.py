"""The faults that must not lose, tear or mix anything, by the numbers of the reliability page."""

from __future__ import annotations

FAULTS: dict[int, str] = {
    1: "SIGKILL at every system call of a commit",
    2: "power cut after each step of a commit",
    3: "no space left, at every write",
    4: "short write",
    5: "EIO from fsync",
    6: "read-only remount",
    7: "no file descriptors, no memory",
    8: "a flipped byte in each file",
    9: "a truncated, missing, extra file",
    10: "every commit corrupt",
    11: "ten crashed saves, then retention",
    12: "crash inside retention",
    14: "a second daemon on the directory",
    15: "parent killed, worker alive",
    16: "SIGSTOP past the watchdog",
    17: "SIGTERM during a commit",
    18: "SIGKILL at random moments, with a stream audit",
    22: "clock two hours back, ten days ahead",
    23: "SIGKILL after every request to the store",
    24: "connection reset at every 64 KiB",
    25: "response lost on each put",
    26: "a store that swallows everything",
    27: "a storm of 500, 503 and SlowDown",
    28: "expired credentials",
    29: "a store that ignores conditions",
    30: "two daemons, one prefix",
    31: "lease holder paused past its TTL, then woken",
    32: "crash between manifest and latest",
    33: "latest lost, garbled, dangling",
    35: "exception while building an export",
    36: "the server stores wrong bytes",
    37: "NaN in x",
    38: "leftover multipart uploads",
    39: "retention deletes while a pull reads",
    40: "a pull killed at every system call",
    41: "hostile names in a manifest",
    42: "disk full during a pull",
    43: "two pulls at once",
    44: "a newer manifest version",
}

ONE_POINT = frozenset({10, 14, 15, 28, 30, 44})
"""What has a single point at which it can happen; every other fault is injected at ten different ones or more."""
