"""`anytimed list`: what is published."""

from __future__ import annotations

import json
import sys
import time

from rich.table import Table

from anytimed.cli.app import AsJson, Url, app, out
from anytimed.urls import told


@app.command("list")
def list_(url: Url, as_json: AsJson = False) -> None:
    """List what is published, newest first."""
    from anytimed.service.console import ago, number, size
    from anytimed.storage.pull import list_checkpoints

    manifests = sorted(list_checkpoints(url), key=lambda manifest: manifest.order, reverse=True)
    if as_json:
        sys.stdout.write(json.dumps([manifest.model_dump(mode="json") for manifest in manifests]) + "\n")
        return
    table = Table("checkpoint", "step", "tokens", "hold-out loss of x", "size", "age", box=None, padding=(0, 2, 0, 0))
    for m in manifests:
        loss = number(m.evaluation.loss_x if m.evaluation else None)
        table.add_row(m.id, f"{m.step:,}", f"{m.tokens:,}", loss, size(m.total_bytes), ago(time.time() - m.created_s))
    out.print(table if manifests else f"Nothing is published at {told(url)} yet.")
