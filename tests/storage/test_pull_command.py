"""`anytimed pull`, stopped by ctrl-C and called again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.storage.material import Site, tree
from tests.storage.web_server import WebServer


def test_ctrl_c_says_that_the_next_pull_goes_on_and_it_says_where(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    item = site.publish(1)
    reached, go_on = threading.Event(), threading.Event()
    with WebServer(tmp_path / "published") as web:

        def hold(path: str) -> None:
            if path.endswith("tokenizer.json"):  # the second file
                reached.set()
                go_on.wait()

        web.before = hold
        command = [sys.executable, "-m", "anytimed.cli", "pull", web.url, "--to", str(tmp_path / "model")]
        # A test run that a shell put into the background ignores SIGINT, and so would what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stopped = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, before)
        assert reached.wait(60)
        stopped.send_signal(signal.SIGINT)
        out, told = stopped.communicate()
        go_on.set()
        assert (stopped.returncode, out) == (130, "") and "Traceback" not in told
        assert "Stopped. The next pull into" in told and "goes on from there." in " ".join(told.split())
        web.asked.clear()
        again = subprocess.run(command, capture_output=True, text=True)
    first = item.manifest.files[0]
    assert (
        again.returncode == 0 and again.stderr == f"resumed at {first.size} B of {_size(item.manifest.total_bytes)}\n"
    )
    assert first.name not in {name for name, _, _ in web.asked}
    assert tree(tmp_path / "model" / "current")["model.safetensors"] and item.id in again.stdout


def _size(count: int) -> str:
    return f"{count / 1000:.1f} kB" if count >= 1000 else f"{count} B"
