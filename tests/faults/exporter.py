"""A process that publishes as the daemon does, to be harmed: `python -m tests.faults.exporter FOLDER URL`.

It takes orders as JSON lines on stdin, and forks a child for each, so that the imports are paid once. The child says
its pid, waits for a line, then goes the way of a start: the run's lock and term, probe and lease (`Keeper`), what the
spool holds, one export of the step that was asked for, published by the `Outbox`, retention, the lease given up. Every
value of an export says of which step it is. When the child is gone its exit is told: minus the signal, or the code.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aiobotocore.session  # noqa: F401 - imported once, before the forks
import numpy as np
import s3fs  # noqa: F401

from anytimed.contracts import AnytimedError, HostTensor, Json
from anytimed.service.keeper import Keeper
from anytimed.service.outbox import Outbox
from anytimed.service.requests import Request
from anytimed.storage.exports import ExportContent, Publisher, Spool, SpoolItem
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store
from tests.faults import servers
from tests.storage import faults
from tests.storage.material import evaluation


def content(step: int, elements: int = 1000, *, poison: Json | None = None, loss_x: float = 3.0) -> ExportContent:
    """An export whose every value is its step; all but one where `poison` gives a tensor, an index and a value."""

    def full(name: str, count: int) -> HostTensor:
        values = np.full(count, step, "<f4")
        if poison is not None and poison["tensor"] == name:
            values[poison["index"]] = float(poison["value"])
        return HostTensor("F32", (count,), values.data.cast("B"))

    return ExportContent(
        step=step,
        tokens=100 * step,
        tensors={name: full(name, count) for name, count in (("w.first", elements), ("w.second", 100))},
        config={"model_type": "llama", "step": step},
        files={"tokenizer.json": json.dumps({"step": step}).encode()},
        optimizer={},
        evaluation=evaluation(loss_x, step=step),
        config_digest="0" * 64,
        lineage={},
    )


class Export:
    """A start of the export side on a run directory, as `service.recovery` and the loop make it."""

    def __init__(self, folder: Path, url: str, order: Json) -> None:
        self.run = RunDirectory(folder)
        self.run.acquire()
        options = servers.options(order["port"]) if url.startswith("s3") else {}
        self.store = Store(url, options, deadline_s=order.get("deadline_s", 10.0))
        publisher = Publisher(self.store)
        self.posted: list[Request] = []
        try:
            term = publisher.latest_term()
            if term >= self.run.term:
                self.run.release()
                self.run.acquire(at_least=term)
        except AnytimedError as error:
            print(json.dumps({"told": str(error)}), flush=True)
        ttl_s = order.get("ttl_s", 6.0)
        run = self.run
        self.keeper = Keeper(self.store, run.run_id, run.term, self.posted.append, ttl_s=ttl_s, require=False)
        self.publisher = publisher
        self.outbox = Outbox(
            Spool(run, max_shard_bytes=10_000_000), publisher, self.keeper, self.posted.append, url, None
        )
        self.keeper.on_held = self.outbox.wake

    def start(self) -> None:
        self.keeper.start()
        self.outbox.start()

    def close(self) -> None:
        self.outbox.close()
        self.keeper.close()
        self.run.release()


def carry_out(folder: Path, url: str, order: Json) -> None:
    export = Export(folder, url, order)
    export.start()
    if "step" in order:
        made = content(
            order["step"], order.get("elements", 1000), poison=order.get("poison"), loss_x=order.get("loss_x", 3.0)
        )
        fault = order.get("build_fault")
        if fault is not None:
            build = Spool.build

            def harmed(spool: Spool, content: ExportContent) -> SpoolItem:
                with faults.at_call(fault["call"], faults.error(fault["errno"]), thread=threading.get_ident()):
                    return build(spool, content)

            Spool.build = harmed  # type: ignore[method-assign]
        export.outbox.submit(lambda: made)
    errors: list[str] = []
    deadline = time.monotonic() + order.get("patience_s", 30.0)
    while time.monotonic() < deadline:
        refused = next((r for p in export.posted if (r := getattr(p, "refused", None))), None)
        if refused is not None:
            print(json.dumps({"told": str(refused)}), flush=True)
            os._exit(3)
        done = export.outbox.idle and export.keeper.held
        errors = [error for p in export.posted if (error := getattr(p, "error", None))]
        if done:
            break
        if errors and order.get("until_error"):
            deadline = 0.0
        time.sleep(0.01)
    else:
        print(json.dumps({"told": str(errors[-1:])}), flush=True)
        os._exit(1)
    if order.get("hold"):
        print(json.dumps({"holds": True}), flush=True)
        _line()
        if any(getattr(p, "refused", None) for p in export.posted):
            os._exit(3)
    if errors:
        print(json.dumps({"told": str(errors[-1])}), flush=True)
    export.publisher.retain(keep=2, longest_pull_s=0.0, grace_s=order.get("grace_s", 0.0), check=export.keeper.check)
    export.close()
    os._exit(0)


def _line() -> str:
    """A line of stdin without reading ahead: parent and child take turns at it."""
    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def main(folder: Path, url: str) -> None:
    while order := _line():
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps({"pid": os.getpid()}), flush=True)
                _line()
                carry_out(folder, url, json.loads(order))
            except BaseException as error:  # noqa: BLE001 - a child must not run on as its parent
                print(json.dumps({"told": f"{type(error).__name__}: {error}"}), flush=True)
                os._exit(getattr(error, "exit_code", 9))
        status: Any = os.waitpid(child, 0)[1]
        print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
