"""`anytimed diff` of a real run: what it tells is what the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from anytimed.service.diff_view import manifest_lines, weight_lines
from anytimed.storage.changes import ancestry, changes
from anytimed.storage.movement import Differs, Moved
from anytimed.storage.pull import list_checkpoints
from tests import tiny
from tests.storage.material import Site


def test_two_checkpoints_of_a_run(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 40)
    tiny.run("run", tiny.config(tmp_path, exports={"dtype": "bfloat16"}), "--steps", "28")
    url = str(tmp_path / "published")
    newest, *_, oldest = list_checkpoints(url)
    found = json.loads(tiny.run("diff", f"{url}@{oldest.id}", url, "--json"))
    told = found["manifest"]
    assert (told["step"], told["tokens"]) == (newest.step - oldest.step, newest.tokens - oldest.tokens)
    assert told["same_run"] and told["ancestry"] == {"chain": [m.id for m in list_checkpoints(url)], "whole": True}
    assert told["lineage"]["main"]["records"] == newest.lineage["main"]["records"] - oldest.lineage["main"]["records"]
    a, b = (load_file(tmp_path / "published/checkpoints" / m.id / "model.safetensors") for m in (oldest, newest))
    assert {t["name"] for t in found["tensors"]} == a.keys() and found["not_compared"] == []
    for each in found["tensors"]:
        one, other = a[each["name"]].double().flatten(), b[each["name"]].double().flatten()
        assert a[each["name"]].dtype == torch.bfloat16
        assert each["change"] == pytest.approx(((other - one).norm() / one.norm()).item(), rel=1e-9)
        assert each["cosine"] == pytest.approx(torch.dot(one, other).item() / (one.norm() * other.norm()).item())
    assert [layer["name"] for layer in found["layers"]] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"
    ]  # fmt: skip
    # As people see it; and without the weights, from two manifests.
    shown = tiny.run("diff", f"{url}@{oldest.id}", url, "--top", "3")
    assert f"B descends from A, {len(list_checkpoints(url)) - 1} export" in " ".join(shown.split())
    assert shown.count("◀") == 4 and "model.layers.1" in shown
    assert json.loads(tiny.run("diff", url, url, "--no-weights", "--json"))["manifest"]["step"] == 0


def lines(*shown: object) -> str:
    console = Console(width=80, record=True)
    console.print(*shown, sep="\n", highlight=False)
    return console.export_text()


def test_what_people_see_fits_eighty_columns_and_is_no_markup(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    hostile = "[/bold]\x1b[31mred"
    a = site.publish(1, lineage={hostile: {"records": 1}}, flags=["gone"]).manifest
    b = site.publish(123_456_789, lineage={hostile: {"records": 4}}, flags=[hostile], parent=a.id).manifest
    text = lines(*manifest_lines(changes(a, b), ancestry(a, b, [])))
    assert a.id in text and b.id in text and "+123,456,788" in text
    assert "\x1b" not in text and "[/bold]" in text and "flag, gone in B: gone" in text
    other = b.model_copy(update={"run_id": "f" * 32, "evaluation": None, "term": 7})
    text = " ".join(lines(*manifest_lines(changes(a, other), ancestry(a, other, []))).split())
    assert "another run" in text and "6 starts between" in text and "B was exported before it was evaluated" in text


def test_the_largest_movers_are_marked() -> None:
    each = [Moved(f"layers.{i}.{part}.weight", 1.0, 1.0, 0.1 * i, 1.0, 4) for i in range(3) for part in ("up", "down")]
    text = lines(*weight_lines([*each, Differs(each[0].name, None, "F32 [1]")], 2, False))
    assert [line.split()[0] for line in text.splitlines() if "◀" in line and "the" not in line] == [
        "up.weight",
        "down.weight",
    ]
    assert "◀ the 2 tensors that moved the most, of 6" in text and "not in A → F32 [1]" in text
    everything = lines(*weight_lines(each, 2, True))
    assert everything.count(".weight") == 6
    still = [Moved("w", 1.0, 1.0, 0.0, 1.0, 4)]
    assert "nothing moved" in lines(*weight_lines(still, 2, False))
