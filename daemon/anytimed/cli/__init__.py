"""The command line: the only room that sees everything. One command a file.

Commands that read (`status`, `list`, `pull`, `verify`) import no torch. A failure that a person can act on is one
message on standard error and the exit code of its kind: 1 failure, 2 bad usage or config, 3 refused, 4 pulled an older
checkpoint than the newest."""

from __future__ import annotations

import os
import sys
import threading
import traceback

# In the order of the help text.
# isort: off
from anytimed.cli import init, check, run, status, top, events, logs, data, asking, feed  # noqa: F401
from anytimed.cli import pull, list_, verify, eval_, diff, sample, prove, install_service  # noqa: F401

# isort: on
from anytimed.cli.app import app, err
from anytimed.contracts import AnytimedError
from anytimed.urls import in_environment, keep_secret, told


def main() -> None:
    """Entry point: runs the app and turns errors for people into a message and an exit code. Whatever is said, a
    traceback included, is said without credentials."""
    keep_secret(in_environment(os.environ))
    threading.excepthook = lambda caught: _trace(caught.exc_value)
    try:
        app()
    except AnytimedError as error:
        err.print(f"anytimed: {told(str(error))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # The machine says no (permissions, a full disk, no such folder), and says where; a traceback would not help.
        err.print(f"anytimed: {told(str(error))}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except MemoryError:
        err.print("anytimed: out of memory; nothing of what was committed is lost. Free some, or raise the limit")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a mistake of ours: Python would print it as it is
        _trace(error)
        sys.exit(1)


def _trace(error: BaseException | None) -> None:
    sys.stderr.write(told("".join(traceback.format_exception(error))))
